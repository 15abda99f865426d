/*
 * The two ends of each way between two processes that `atoll bench ring` measures: Atoll's own ring, through the functions
 * that every domain uses (ipc/domain.h), a bare cache line, and descriptors (pipe, Unix socket, message queue).
 *
 *   produce / consume   one direction, 64-byte messages, as fast as both can
 *   ask / answer        a message there and back, one at a time
 *
 * Each end runs in a process of its own. The consumer checks that messages come in order and counts them; `produce` and
 * `ask` end the other end with a last message.
 */
#ifndef ATOLL_BENCH_TRANSPORT_H
#define ATOLL_BENCH_TRANSPORT_H

#include "ipc/domain.h"

/* cffi:begin */
#define BENCH_SAMPLES 262144
#define BENCH_MESSAGE_BYTES 64

enum bench_wait { BENCH_SPIN = 0, BENCH_SLEEP = 1 };
enum bench_pipe { BENCH_STREAM = 0, BENCH_QUEUE = 1 };

/* In memory that both processes share. */
struct bench_result {
    uint64_t count;         /* messages received, or round trips made */
    uint64_t ns;            /* that they took */
    uint64_t wrong;         /* messages out of order */
    uint64_t sample_count;  /* round trips whose time stands below: the first of them */
    uint32_t samples_ns[262144];
};

/* A word in each of two cache lines, in memory that both share. */
struct bench_lines {
    uint64_t there;
    uint64_t reserved_a[15];
    uint64_t back;
    uint64_t reserved_b[15];
};

/* All `ends` call it first; returns when all have. `arrived` is shared and starts at 0. */
void bench_meet(uint32_t *arrived, uint32_t ends);

/* One step takes or puts `batch` messages and commits. */
void bench_ring_produce(struct atoll_domain *domain, uint32_t to, uint32_t batch, int wait, uint64_t duration_ns);
void bench_ring_consume(struct atoll_domain *domain, uint32_t from, uint32_t batch, int wait, struct bench_result *result);
void bench_ring_ask(struct atoll_domain *domain, uint32_t peer, int wait, uint64_t duration_ns, struct bench_result *result);
void bench_ring_answer(struct atoll_domain *domain, uint32_t peer, int wait);

/* A path of domains with `depth` requests on their way, all ends sleeping when there is nothing to do. `ask` counts answers;
 * `pass` is a domain in between, which passes on what comes from either side; `reply` sends each request back. */
void bench_path_ask(struct atoll_domain *domain, uint32_t peer, uint32_t depth, uint64_t duration_ns,
                    struct bench_result *result);
void bench_path_pass(struct atoll_domain *domain, uint32_t left, uint32_t right);
void bench_path_reply(struct atoll_domain *domain, uint32_t peer);

void bench_line_ask(struct bench_lines *lines, uint64_t duration_ns, struct bench_result *result);
void bench_line_answer(struct bench_lines *lines);

/* Blocking descriptors. BENCH_STREAM moves up to `batch` messages with one call, BENCH_QUEUE one. Return 0 or -errno. */
int bench_fd_produce(int fd, int kind, uint32_t batch, uint64_t duration_ns);
int bench_fd_consume(int fd, int kind, uint32_t batch, struct bench_result *result);
int bench_fd_ask(int out, int in, int kind, uint64_t duration_ns, struct bench_result *result);
int bench_fd_answer(int out, int in, int kind);

/* Time of one reading of the clock, which each measured round trip includes. */
double bench_clock_ns(void);
/* cffi:end */

_Static_assert(BENCH_SAMPLES == 262144, "literal in the structure above");
_Static_assert(sizeof(struct atoll_descriptor) == BENCH_MESSAGE_BYTES, "the same work for all");

#endif
