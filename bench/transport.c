/* See transport.h. */
#define _GNU_SOURCE
#include "bench/transport.h"

#include <errno.h>
#include <mqueue.h>
#include <sched.h>
#include <unistd.h>

/* The last message has this number. */
#define LAST UINT64_MAX
#define BATCH_LIMIT 256

static inline void relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}

void bench_meet(uint32_t *arrived, uint32_t ends)
{
    __atomic_fetch_add(arrived, 1, __ATOMIC_SEQ_CST);
    while (atoll_load_acquire(arrived) < ends)
        sched_yield();
}

static void sample(struct bench_result *result, uint64_t ns)
{
    if (result->sample_count < BENCH_SAMPLES)
        result->samples_ns[result->sample_count++] = ns < UINT32_MAX ? (uint32_t)ns : UINT32_MAX;
    result->count++;
}

/* --- Atoll's ring ------------------------------------------------------------------------------------------------- */

static inline __attribute__((always_inline)) void put(struct atoll_domain *domain, uint32_t to, uint64_t number, int wait)
{
    struct atoll_descriptor message = {.opcode = ATOLL_OP_REQUEST, .identity = number};
    while (!atoll_domain_put(domain, to, &message)) {
        atoll_domain_commit(domain);
        if (wait == BENCH_SLEEP)
            sched_yield(); /* nobody is woken by room: in the server a ring is never full */
        else
            relax();
    }
}

/* Takes the next message, waiting for it. */
static uint64_t take(struct atoll_domain *domain, uint32_t from, int wait)
{
    struct atoll_descriptor message;
    while (!atoll_domain_take(domain, from, &message)) {
        if (wait == BENCH_SLEEP)
            atoll_domain_sleep(domain, 0, -1);
        else
            relax();
    }
    return message.identity;
}

void bench_ring_produce(struct atoll_domain *domain, uint32_t to, uint32_t batch, int wait, uint64_t duration_ns)
{
    uint64_t until = atoll_now_ns() + duration_ns, number = 0, looked = 0;
    for (;;) {
        for (uint32_t index = 0; index < batch; index++)
            put(domain, to, number++, wait);
        atoll_domain_commit(domain);
        if (number - looked >= 256) {
            looked = number;
            if (atoll_now_ns() >= until)
                break;
        }
    }
    put(domain, to, LAST, wait);
    atoll_domain_commit(domain);
}

void bench_ring_consume(struct atoll_domain *domain, uint32_t from, uint32_t batch, int wait, struct bench_result *result)
{
    uint64_t expected = 0, number = take(domain, from, wait), begin = atoll_now_ns();
    while (number != LAST) {
        result->wrong += number != expected;
        expected = number + 1;
        uint32_t left = batch;
        struct atoll_descriptor message;
        bool last = false;
        while (--left > 0 && atoll_domain_take(domain, from, &message)) {
            if (message.identity == LAST) {
                last = true;
                break;
            }
            result->wrong += message.identity != expected;
            expected = message.identity + 1;
        }
        atoll_domain_commit(domain);
        if (last)
            break;
        number = take(domain, from, wait);
    }
    result->ns = atoll_now_ns() - begin;
    result->count = expected;
    atoll_domain_commit(domain);
}

void bench_ring_ask(struct atoll_domain *domain, uint32_t peer, int wait, uint64_t duration_ns, struct bench_result *result)
{
    uint64_t begin = atoll_now_ns(), now = begin, number = 0;
    while (now - begin < duration_ns) {
        put(domain, peer, number, wait);
        atoll_domain_commit(domain); /* of the last answer, too: as in a domain, one a step */
        result->wrong += take(domain, peer, wait) != number;
        number++;
        uint64_t then = now;
        now = atoll_now_ns();
        sample(result, now - then);
    }
    result->ns = now - begin;
    put(domain, peer, LAST, wait);
    atoll_domain_commit(domain);
}

void bench_ring_answer(struct atoll_domain *domain, uint32_t peer, int wait)
{
    for (;;) {
        uint64_t number = take(domain, peer, wait);
        if (number == LAST)
            break;
        put(domain, peer, number, wait);
        atoll_domain_commit(domain);
    }
    atoll_domain_commit(domain);
}

/* --- A path of domains -------------------------------------------------------------------------------------------- */

/* As a domain's step: at most so many messages, then a commit. */
#define STEP 64

void bench_path_ask(struct atoll_domain *domain, uint32_t peer, uint32_t depth, uint64_t duration_ns,
                    struct bench_result *result)
{
    struct atoll_descriptor message;
    uint64_t begin = atoll_now_ns(), sent = 0;
    for (; sent < depth; sent++)
        put(domain, peer, sent, BENCH_SLEEP);
    atoll_domain_commit(domain);
    for (bool more = true; result->count < sent;) {
        uint32_t taken = 0;
        for (; taken < STEP && atoll_domain_take(domain, peer, &message); taken++) {
            result->wrong += message.identity != result->count++;
            if (more)
                put(domain, peer, sent++, BENCH_SLEEP);
        }
        if (taken == 0) {
            atoll_domain_sleep(domain, 0, -1);
            continue;
        }
        atoll_domain_commit(domain);
        more = more && atoll_now_ns() - begin < duration_ns;
    }
    result->ns = atoll_now_ns() - begin;
    put(domain, peer, LAST, BENCH_SLEEP);
    atoll_domain_commit(domain);
}

void bench_path_pass(struct atoll_domain *domain, uint32_t left, uint32_t right)
{
    struct atoll_descriptor message;
    for (bool last = false; !last;) {
        uint32_t taken = 0;
        for (; !last && taken < STEP && atoll_domain_take(domain, left, &message); taken++) {
            last = message.identity == LAST;
            while (!atoll_domain_put(domain, right, &message))
                atoll_domain_commit(domain);
        }
        for (; taken < 2 * STEP && atoll_domain_take(domain, right, &message); taken++)
            while (!atoll_domain_put(domain, left, &message))
                atoll_domain_commit(domain);
        atoll_domain_commit(domain);
        if (taken == 0)
            atoll_domain_sleep(domain, 0, -1);
    }
}

void bench_path_reply(struct atoll_domain *domain, uint32_t peer)
{
    struct atoll_descriptor message;
    for (;;) {
        uint32_t taken = 0;
        for (; taken < STEP && atoll_domain_take(domain, peer, &message); taken++) {
            if (message.identity == LAST) {
                atoll_domain_commit(domain);
                return;
            }
            while (!atoll_domain_put(domain, peer, &message))
                atoll_domain_commit(domain);
        }
        atoll_domain_commit(domain);
        if (taken == 0)
            atoll_domain_sleep(domain, 0, -1);
    }
}

/* --- A bare cache line -------------------------------------------------------------------------------------------- */

void bench_line_ask(struct bench_lines *lines, uint64_t duration_ns, struct bench_result *result)
{
    uint64_t begin = atoll_now_ns(), now = begin, number = 0;
    while (now - begin < duration_ns) {
        number++;
        atoll_store_release(&lines->there, number);
        while (atoll_load_acquire(&lines->back) != number)
            relax();
        uint64_t then = now;
        now = atoll_now_ns();
        sample(result, now - then);
    }
    result->ns = now - begin;
    atoll_store_release(&lines->there, LAST);
}

void bench_line_answer(struct bench_lines *lines)
{
    uint64_t seen = 0;
    while (seen != LAST) {
        uint64_t number;
        while ((number = atoll_load_acquire(&lines->there)) == seen)
            relax();
        atoll_store_release(&lines->back, number);
        seen = number;
    }
}

/* --- Descriptors -------------------------------------------------------------------------------------------------- */

struct text {
    uint64_t number;
    uint64_t rest[BENCH_MESSAGE_BYTES / 8 - 1];
};

static int send_all(int fd, int kind, const struct text *messages, uint32_t count)
{
    if (kind == BENCH_QUEUE) {
        for (uint32_t index = 0; index < count; index++)
            while (mq_send(fd, (const char *)&messages[index], sizeof messages[index], 0) != 0)
                if (errno != EINTR)
                    return -errno;
        return 0;
    }
    const char *at = (const char *)messages;
    size_t left = count * sizeof *messages;
    while (left > 0) {
        ssize_t done = write(fd, at, left);
        if (done < 0 && errno == EINTR)
            continue;
        if (done < 0)
            return -errno;
        at += done;
        left -= (size_t)done;
    }
    return 0;
}

/* Up to `count` whole messages; their number or -errno. */
static int receive(int fd, int kind, struct text *messages, uint32_t count)
{
    size_t have = 0;
    for (;;) {
        ssize_t done = kind == BENCH_QUEUE ? mq_receive(fd, (char *)messages, sizeof *messages, 0)
                                           : read(fd, (char *)messages + have, count * sizeof *messages - have);
        if (done < 0 && errno == EINTR)
            continue;
        if (done <= 0)
            return done < 0 ? -errno : -EPIPE;
        have += (size_t)done;
        if (have % sizeof *messages == 0)
            return (int)(have / sizeof *messages);
    }
}

int bench_fd_produce(int fd, int kind, uint32_t batch, uint64_t duration_ns)
{
    struct text messages[BATCH_LIMIT] = {0};
    uint64_t until = atoll_now_ns() + duration_ns, number = 0, looked = 0;
    int result;

    assert(batch > 0 && batch <= BATCH_LIMIT);
    do {
        for (uint32_t index = 0; index < batch; index++)
            messages[index].number = number++;
        result = send_all(fd, kind, messages, batch);
        if (result < 0)
            return result;
        if (number - looked < 256)
            continue;
        looked = number;
        if (atoll_now_ns() >= until)
            break;
    } while (true);
    messages[0].number = LAST;
    return send_all(fd, kind, messages, 1);
}

int bench_fd_consume(int fd, int kind, uint32_t batch, struct bench_result *result)
{
    struct text messages[BATCH_LIMIT];
    uint64_t expected = 0, begin = 0;

    assert(batch > 0 && batch <= BATCH_LIMIT);
    for (;;) {
        int count = receive(fd, kind, messages, batch);
        if (count < 0)
            return count;
        if (begin == 0)
            begin = atoll_now_ns();
        for (int index = 0; index < count; index++) {
            if (messages[index].number == LAST) {
                result->ns = atoll_now_ns() - begin;
                result->count = expected;
                return 0;
            }
            result->wrong += messages[index].number != expected;
            expected = messages[index].number + 1;
        }
    }
}

int bench_fd_ask(int out, int in, int kind, uint64_t duration_ns, struct bench_result *result)
{
    struct text message = {0};
    uint64_t begin = atoll_now_ns(), now = begin, number = 0;
    int error;

    while (now - begin < duration_ns) {
        message.number = number;
        if ((error = send_all(out, kind, &message, 1)) < 0 || (error = receive(in, kind, &message, 1)) < 0)
            return error;
        result->wrong += message.number != number++;
        uint64_t then = now;
        now = atoll_now_ns();
        sample(result, now - then);
    }
    result->ns = now - begin;
    message.number = LAST;
    return send_all(out, kind, &message, 1);
}

int bench_fd_answer(int out, int in, int kind)
{
    struct text message;
    int error;

    for (;;) {
        if ((error = receive(in, kind, &message, 1)) < 0)
            return error;
        if (message.number == LAST)
            return 0;
        if ((error = send_all(out, kind, &message, 1)) < 0)
            return error;
    }
}

double bench_clock_ns(void)
{
    uint64_t begin = atoll_now_ns();
    for (int count = 0; count < 9999; count++)
        (void)atoll_now_ns();
    return (double)(atoll_now_ns() - begin) / 10000;
}
