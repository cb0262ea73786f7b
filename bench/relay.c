/* The floor: a process that only copies bytes from publishers to subscribers. It parses nothing, so no server that has to
   look at its messages can be cheaper by much; how close one comes says how little it adds.

   A connection's first byte says what it is: 'P' publisher, 'S' subscriber. It is answered with the same byte, so that
   whoever connects knows that the relay has taken note. Prints its address, serves until it is killed. */
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#ifndef MSG_NOSIGNAL
#define MSG_NOSIGNAL 0
#endif

enum { MAX = 1024, CHUNK = 1 << 18 };

static int subscribers[MAX], n_subscribers;
static struct pollfd publishers[MAX + 1]; /* [0] is the listening socket */
static nfds_t n_polled = 1;
static char chunk[CHUNK];

static int welcome(int listening) {
    int one = 1, fd = accept(listening, NULL, NULL);
    char role;
    if (fd < 0 || recv(fd, &role, 1, 0) != 1 || send(fd, &role, 1, MSG_NOSIGNAL) != 1) return -1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (role == 'S' && n_subscribers < MAX) subscribers[n_subscribers++] = fd;
    else if (role == 'P' && n_polled <= MAX) publishers[n_polled++] = (struct pollfd){fd, POLLIN, 0};
    else close(fd);
    return 0;
}

static int copy_to_all(ssize_t len) {
    for (int i = 0; i < n_subscribers; i++)
        for (ssize_t at = 0; at < len;) {
            ssize_t sent = send(subscribers[i], chunk + at, (size_t)(len - at), MSG_NOSIGNAL);
            if (sent <= 0) return -1;
            at += sent;
        }
    return 0;
}

int main(void) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t len = sizeof address;
    int listening = socket(AF_INET, SOCK_STREAM, 0);
    if (listening < 0 || bind(listening, (struct sockaddr *)&address, len) < 0 || listen(listening, MAX) < 0 ||
        getsockname(listening, (struct sockaddr *)&address, &len) < 0) {
        perror("relay");
        return 1;
    }
    fprintf(stderr, "relay listening on 127.0.0.1:%d\n", ntohs(address.sin_port));
    publishers[0] = (struct pollfd){listening, POLLIN, 0};
    for (;;) {
        if (poll(publishers, n_polled, -1) < 0) return 1;
        if (publishers[0].revents && welcome(listening) < 0) return 1;
        for (nfds_t i = 1; i < n_polled; i++) {
            if (!publishers[i].revents) continue;
            ssize_t got = recv(publishers[i].fd, chunk, CHUNK, 0);
            if (got <= 0 || copy_to_all(got) < 0) return 0;
        }
    }
}
