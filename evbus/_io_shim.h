/* The only place with system calls of its own: one read and one gathered write on a socket, alike on POSIX and Winsock.
 *
 * Both return the number of bytes (0 from a read is the end of the stream), EVBUS_WOULD_BLOCK if the socket is not
 * ready, or EVBUS_FAILED with the system's error number in *error. An interrupted call is made again. They touch no
 * Python object, so that they are called without the interpreter lock.
 */
#ifndef EVBUS_IO_SHIM_H
#define EVBUS_IO_SHIM_H

#include <stddef.h>
#include <stdint.h>

#define EVBUS_WOULD_BLOCK (-1)
#define EVBUS_FAILED (-2)
#define EVBUS_IOV_MAX 3

#ifdef _WIN32

#ifndef WIN32_LEAN_AND_MEAN
#define WIN32_LEAN_AND_MEAN
#endif
#include <winsock2.h>

/* WSABUF counts in 32 bits; one call never needs more. */
#define EVBUS_CALL_MAX ((size_t)1 << 30)

typedef struct {
    WSABUF part[EVBUS_IOV_MAX];
    DWORD count;
} evbus_iov_t;

static inline void evbus_iov_add(evbus_iov_t *iov, const void *data, size_t size) {
    iov->part[iov->count].buf = (char *)data;
    iov->part[iov->count].len = (ULONG)(size > EVBUS_CALL_MAX ? EVBUS_CALL_MAX : size);
    iov->count++;
}

static inline int64_t evbus_io_failed(int *error) {
    int code = WSAGetLastError();
    if (code == WSAEWOULDBLOCK)
        return EVBUS_WOULD_BLOCK;
    *error = code;
    return EVBUS_FAILED;
}

static inline int64_t evbus_recv(int64_t fd, void *data, size_t size, int *error) {
    WSABUF part;
    DWORD taken = 0, flags = 0;
    part.buf = (char *)data;
    part.len = (ULONG)(size > EVBUS_CALL_MAX ? EVBUS_CALL_MAX : size);
    for (;;) {
        if (WSARecv((SOCKET)fd, &part, 1, &taken, &flags, NULL, NULL) == 0)
            return (int64_t)taken;
        if (WSAGetLastError() != WSAEINTR)
            return evbus_io_failed(error);
    }
}

static inline int64_t evbus_send(int64_t fd, evbus_iov_t *iov, int *error) {
    DWORD taken = 0;
    for (;;) {
        if (WSASend((SOCKET)fd, iov->part, iov->count, &taken, 0, NULL, NULL) == 0)
            return (int64_t)taken;
        if (WSAGetLastError() != WSAEINTR)
            return evbus_io_failed(error);
    }
}

#else

#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/types.h>
#include <sys/uio.h>

/* A peer that has gone must be an error of the call, not a signal. macOS has no such flag; there the socket option
 * SO_NOSIGPIPE does it (transport.py), and Python ignores SIGPIPE anyway. */
#ifdef MSG_NOSIGNAL
#define EVBUS_SEND_FLAGS MSG_NOSIGNAL
#else
#define EVBUS_SEND_FLAGS 0
#endif

typedef struct {
    struct iovec part[EVBUS_IOV_MAX];
    int count;
} evbus_iov_t;

static inline void evbus_iov_add(evbus_iov_t *iov, const void *data, size_t size) {
    iov->part[iov->count].iov_base = (void *)(uintptr_t)data;
    iov->part[iov->count].iov_len = size;
    iov->count++;
}

static inline int64_t evbus_io_failed(int *error) {
    int code = errno;
    if (code == EAGAIN
#if EWOULDBLOCK != EAGAIN
        || code == EWOULDBLOCK
#endif
    )
        return EVBUS_WOULD_BLOCK;
    *error = code;
    return EVBUS_FAILED;
}

static inline int64_t evbus_recv(int64_t fd, void *data, size_t size, int *error) {
    ssize_t n;
    do {
        n = recv((int)fd, data, size, 0);
    } while (n < 0 && errno == EINTR);
    return n >= 0 ? (int64_t)n : evbus_io_failed(error);
}

static inline int64_t evbus_send(int64_t fd, evbus_iov_t *iov, int *error) {
    struct msghdr message;
    ssize_t n;
    if (iov->count == 1) {
        /* The common case, and a little cheaper than a message of one part. */
        do {
            n = send((int)fd, iov->part[0].iov_base, iov->part[0].iov_len, EVBUS_SEND_FLAGS);
        } while (n < 0 && errno == EINTR);
    } else {
        memset(&message, 0, sizeof message);
        message.msg_iov = iov->part;
        /* size_t with glibc, int elsewhere: the count is at most EVBUS_IOV_MAX. */
        message.msg_iovlen = (unsigned char)iov->count;
        do {
            n = sendmsg((int)fd, &message, EVBUS_SEND_FLAGS);
        } while (n < 0 && errno == EINTR);
    }
    return n >= 0 ? (int64_t)n : evbus_io_failed(error);
}

#endif
#endif
