/* The load: publishes pre-encoded frames over plain sockets and counts, or checks, what reaches the subscribers.

   It knows no protocol. A frame is some bytes of which a stretch is the payload; a delivery is some bytes, always the
   same number of them, of which a stretch is the same payload. So every server is driven at the same low cost, and what
   is measured is the server. One thread, one poll() loop, nonblocking sockets, loopback only.

   Two ways to run: `load_check` numbers every message (a stamp at the head of the payload: publisher, sequence), takes
   every delivery apart and fails on the first byte that is not as it must be; `load_time` sends the same bytes over and
   over and only counts. A third, `load_paced`, sends each message at its time, checks like the first, and notes how long
   after that time each delivery was there.

   There may be several frames, of the same length and with the same payload, one for each subject: message i is frame i
   modulo their number. Where each subscriber has a share of the subjects, subscriber s of n gets messages s, s + n, ... */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

#ifndef MSG_NOSIGNAL
#define MSG_NOSIGNAL 0 /* macOS; Python ignores SIGPIPE anyway */
#endif

enum { STAMP = 12, SINK = 1 << 20, BATCH = 1 << 16 };

enum outcome {
    DONE = 0,
    TIMED_OUT = 1,   /* not everything had arrived at the deadline */
    CLOSED = 2,      /* a connection ended or failed */
    OUT_OF_ORDER = 3, /* a sequence number is not the next one: lost, repeated or overtaken */
    DAMAGED = 4,     /* a payload is not the one that was sent */
    SURPLUS = 5,     /* more bytes than were due */
    INTERRUPTED = 6, /* a signal */
    NO_MEMORY = 7,
};

struct frames {
    const uint8_t *frame; /* what a publisher sends for one message */
    int64_t frame_len;
    int64_t payload_at; /* where in it the payload lies */
    int64_t payload_len;
    int64_t delivery_len; /* what a subscriber receives for one message */
    int64_t delivery_payload_at;
    int64_t reply_len; /* what the publisher receives for one message: 0 if the server says nothing */
    int64_t n_frames;  /* how many frames stand one behind the other at `frame` */
};

struct plan {
    const int *publishers;
    const int *subscribers;
    int32_t n_publishers;
    int32_t n_subscribers;
    int64_t messages; /* of each publisher */
    int64_t window;   /* messages that may be under way to the slowest subscriber */
    double limit_s;
    int32_t share;        /* 1: each subscriber gets its share of the messages; 0: all of them */
    double interval_s;    /* from one message to the next; 0: as fast as the window allows. One publisher only */
    double *latencies_s;  /* with an interval: one for each delivery, by message and subscriber; else NULL */
};

struct result {
    double seconds;
    int64_t delivered; /* whole deliveries, all subscribers together */
    int32_t subscriber; /* whose connection the trouble was on; -1: a publisher's */
    int32_t publisher;
    int64_t expected;
    int64_t found;
};

struct out { /* one publisher */
    int64_t numbered; /* messages put into its batch so far */
    int64_t at, end;  /* unsent stretch of the batch */
    int64_t replied;
    uint8_t *batch;
};

struct in { /* one subscriber */
    int64_t received; /* bytes */
    int64_t have;     /* bytes of an unfinished delivery */
    uint8_t *part;
    int64_t *next; /* by publisher: the sequence number that is due */
    int64_t due;   /* bytes */
};

static double begun_s; /* when message 0 of a paced run was due */

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static void stamp(uint8_t *to, uint32_t publisher, uint64_t sequence) {
    memcpy(to, &publisher, sizeof publisher);
    memcpy(to + sizeof publisher, &sequence, sizeof sequence);
}

/* One whole delivery of subscriber `s`: is it the next message of its publisher, byte for byte? */
static enum outcome check(const struct frames *f, const struct plan *plan, struct in *in, const uint8_t *delivery,
                          struct result *result) {
    const uint8_t *payload = delivery + f->delivery_payload_at;
    uint32_t publisher;
    uint64_t sequence;
    memcpy(&publisher, payload, sizeof publisher);
    memcpy(&sequence, payload + sizeof publisher, sizeof sequence);
    if (publisher >= (uint32_t)plan->n_publishers) {
        result->found = publisher;
        return DAMAGED;
    }
    result->publisher = (int32_t)publisher;
    result->expected = in->next[publisher];
    result->found = (int64_t)sequence;
    if (sequence != (uint64_t)in->next[publisher]) return OUT_OF_ORDER;
    if (memcmp(payload + STAMP, f->frame + f->payload_at + STAMP, (size_t)(f->payload_len - STAMP)) != 0) return DAMAGED;
    in->next[publisher] += plan->share ? plan->n_subscribers : 1;
    if (plan->latencies_s) {
        int64_t at = plan->share ? (int64_t)sequence : (int64_t)sequence * plan->n_subscribers + result->subscriber;
        plan->latencies_s[at] = now() - (begun_s + (double)sequence * plan->interval_s);
    }
    return DONE;
}

/* Takes received bytes apart into deliveries. */
static enum outcome take_apart(const struct frames *f, const struct plan *plan, struct in *in, const uint8_t *data,
                               int64_t len, struct result *result) {
    while (len > 0) {
        enum outcome outcome = DONE;
        if (in->have == 0 && len >= f->delivery_len) {
            outcome = check(f, plan, in, data, result);
            data += f->delivery_len, len -= f->delivery_len;
        } else {
            int64_t take = f->delivery_len - in->have;
            if (take > len) take = len;
            memcpy(in->part + in->have, data, (size_t)take);
            in->have += take, data += take, len -= take;
            if (in->have < f->delivery_len) break;
            in->have = 0;
            outcome = check(f, plan, in, in->part, result);
        }
        if (outcome != DONE) return outcome;
    }
    return DONE;
}

/* Fills a publisher's batch with up to `room` messages more, numbered if they are to be checked. */
static void refill(const struct frames *f, const struct plan *plan, struct out *out, uint32_t publisher, int64_t room,
                   int checked) {
    int64_t fit = BATCH / f->frame_len > 0 ? BATCH / f->frame_len : 1;
    int64_t n = plan->messages - out->numbered;
    if (n > room) n = room;
    if (n > fit) n = fit;
    if (checked || f->n_frames > 1)
        for (int64_t i = 0; i < n; i++) {
            uint8_t *frame = out->batch + i * f->frame_len;
            memcpy(frame, f->frame + (out->numbered + i) % f->n_frames * f->frame_len, (size_t)f->frame_len);
            if (checked) stamp(frame + f->payload_at, publisher, (uint64_t)(out->numbered + i));
        }
    out->numbered += n;
    out->at = 0;
    out->end = n * f->frame_len;
}

static enum outcome publish(const struct frames *f, const struct plan *plan, struct out *out, int fd, uint32_t publisher,
                            int64_t room, int checked) {
    if (out->at == out->end) refill(f, plan, out, publisher, room, checked);
    if (out->at == out->end) return DONE;
    ssize_t sent = send(fd, out->batch + out->at, (size_t)(out->end - out->at), MSG_DONTWAIT | MSG_NOSIGNAL);
    if (sent < 0) return errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR ? DONE : CLOSED;
    out->at += sent;
    return DONE;
}

/* Bytes are received, or 0 if there are none now, or -1 if the connection has ended. */
static int64_t receive(int fd, uint8_t *sink, int keep) {
    int flags = MSG_DONTWAIT;
#ifdef __linux__
    if (!keep) flags |= MSG_TRUNC; /* the kernel throws the bytes away instead of copying them: the load stays cheap */
#else
    (void)keep;
#endif
    ssize_t n = recv(fd, sink, SINK, flags);
    if (n > 0) return n;
    return n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR) ? 0 : -1;
}

static enum outcome run(const struct frames *f, const struct plan *plan, struct out *outs, struct in *ins,
                        struct pollfd *polled, uint8_t *sink, int checked, struct result *result) {
    int np = plan->n_publishers, ns = plan->n_subscribers;
    int64_t all = plan->messages * np, replies = plan->messages * f->reply_len, step = plan->share ? ns : 1;
    begun_s = now();
    for (int i = 0; i < np; i++) polled[i].fd = plan->publishers[i];
    for (int i = 0; i < ns; i++) polled[np + i].fd = plan->subscribers[i], polled[np + i].events = POLLIN;
    for (int i = 0; i < ns; i++) ins[i].due = (all / step + (step > 1 && i < all % step)) * f->delivery_len;
    double deadline = now() + plan->limit_s;
    for (;;) {
        int64_t slowest = all * f->delivery_len, missing = 0, waiting_for_replies = 0, sent = 0;
        for (int i = 0; i < ns; i++) {
            if (ins[i].received < ins[i].due && ins[i].received < slowest) slowest = ins[i].received;
            missing |= ins[i].received < ins[i].due;
        }
        for (int i = 0; i < np; i++) {
            sent += outs[i].numbered;
            waiting_for_replies |= outs[i].replied < replies;
        }
        if (!missing && !waiting_for_replies) return DONE;
        int64_t room = plan->window - (sent - slowest / f->delivery_len * step);
        if (plan->interval_s > 0) { /* what is due by now, whoever keeps up or not */
            double passed = (now() - begun_s) / plan->interval_s;
            room = (passed < (double)plan->messages ? (int64_t)passed + 1 : plan->messages) - sent;
        }
        for (int i = 0; i < np; i++) {
            int more = outs[i].at < outs[i].end || (outs[i].numbered < plan->messages && room > 0);
            polled[i].events = (short)(POLLIN | (more ? POLLOUT : 0));
        }
        int ready = poll(polled, (nfds_t)(np + ns), plan->interval_s > 0 ? 0 : 200); /* paced: spins, on a core of its own */
        if (ready < 0) return errno == EINTR ? INTERRUPTED : CLOSED;
        if (now() > deadline) return TIMED_OUT;
        for (int i = 0; i < ns; i++) {
            if (!polled[np + i].revents) continue;
            result->subscriber = i;
            int64_t n = receive(plan->subscribers[i], sink, checked);
            if (n < 0) return CLOSED;
            ins[i].received += n;
            result->found = ins[i].received, result->expected = ins[i].due;
            if (ins[i].received > ins[i].due) return SURPLUS;
            if (checked) {
                enum outcome outcome = take_apart(f, plan, &ins[i], sink, n, result);
                if (outcome != DONE) return outcome;
            }
        }
        for (int i = 0; i < np; i++) {
            result->subscriber = -1, result->publisher = i;
            if (polled[i].revents & (POLLIN | POLLHUP | POLLERR)) {
                int64_t n = receive(plan->publishers[i], sink, checked);
                if (n < 0) return CLOSED;
                outs[i].replied += n;
                result->found = outs[i].replied, result->expected = replies;
                if (outs[i].replied > replies) return SURPLUS;
            }
            if (polled[i].revents & POLLOUT) {
                int64_t before = outs[i].numbered;
                enum outcome outcome = publish(f, plan, &outs[i], plan->publishers[i], (uint32_t)i, room, checked);
                if (outcome != DONE) return outcome;
                room -= outs[i].numbered - before;
            }
        }
    }
}

static int start(const struct frames *f, const struct plan *plan, int checked, struct result *result) {
    int np = plan->n_publishers, ns = plan->n_subscribers, complete;
    int64_t batch = f->frame_len > BATCH ? f->frame_len : BATCH / f->frame_len * f->frame_len;
    struct out *outs = calloc((size_t)np, sizeof *outs);
    struct in *ins = calloc((size_t)ns, sizeof *ins);
    struct pollfd *polled = calloc((size_t)(np + ns), sizeof *polled);
    uint8_t *sink = malloc(SINK);
    enum outcome outcome = NO_MEMORY;
    memset(result, 0, sizeof *result);
    complete = outs && ins && polled && sink;
    for (int i = 0; complete && i < np; i++) {
        outs[i].batch = malloc((size_t)batch);
        if (!outs[i].batch) complete = 0;
        else
            for (int64_t at = 0; at + f->frame_len <= batch; at += f->frame_len) memcpy(outs[i].batch + at, f->frame, (size_t)f->frame_len);
    }
    for (int i = 0; complete && i < ns; i++) {
        ins[i].part = malloc((size_t)f->delivery_len);
        ins[i].next = calloc((size_t)np, sizeof *ins[i].next);
        complete = ins[i].part && ins[i].next;
        for (int p = 0; complete && plan->share && p < np; p++) ins[i].next[p] = i;
    }
    if (complete) {
        double began = now();
        outcome = run(f, plan, outs, ins, polled, sink, checked, result);
        result->seconds = now() - began;
    }
    for (int i = 0; ins && i < ns; i++) {
        result->delivered += ins[i].received / f->delivery_len;
        free(ins[i].part), free(ins[i].next);
    }
    for (int i = 0; outs && i < np; i++) free(outs[i].batch);
    free(outs), free(ins), free(polled), free(sink);
    return outcome;
}

int load_check(const struct frames *f, const struct plan *plan, struct result *result) { return start(f, plan, 1, result); }

int load_paced(const struct frames *f, const struct plan *plan, struct result *result) { return start(f, plan, 1, result); }

int load_time(const struct frames *f, const struct plan *plan, struct result *result) { return start(f, plan, 0, result); }
