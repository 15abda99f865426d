/*
 * DPDK's ring on the work of bench/transport.c: 64-byte elements, one producer, one consumer, in plain shared memory,
 * without hugepages and without DPDK's environment. Compiled by bench/compiled.py where libdpdk is installed.
 *
 * As there: `produce` makes `batch` messages, all 64 bytes of each, and hands them over together, `consume` takes up to `batch` and checks
 * their order, `ask` and `answer` pass one message there and back; all of them spin.
 */
#include <stdint.h>
#include <string.h>
#include <time.h>

#include <rte_ring.h>
#include <rte_ring_elem.h>

#define LAST UINT64_MAX
#define BATCH_LIMIT 256

struct message {
    uint64_t number;
    uint64_t rest[7];
} __attribute__((aligned(64)));

_Static_assert(sizeof(struct message) == 64, "the same work for all");

/* As struct bench_result of bench/transport.h begins. */
struct result {
    uint64_t count, ns, wrong, sample_count;
    uint32_t samples_ns[262144];
};

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

int64_t rte_bench_bytes(uint32_t entries) { return rte_ring_get_memsize_elem(sizeof(struct message), entries); }

/* `entries` a power of two; one of them stays empty. 0 or a negative errno. */
int rte_bench_make(void *memory, uint32_t entries)
{
    return rte_ring_init(memory, "bench", entries, RING_F_SP_ENQ | RING_F_SC_DEQ);
}

static void put(struct rte_ring *ring, const struct message *messages, uint32_t count)
{
    while (rte_ring_sp_enqueue_bulk_elem(ring, messages, sizeof *messages, count, NULL) == 0)
        rte_pause();
}

void rte_bench_produce(void *ring, uint32_t batch, uint64_t duration_ns)
{
    struct message messages[BATCH_LIMIT];
    uint64_t until = now_ns() + duration_ns, number = 0, looked = 0;
    for (;;) {
        for (uint32_t index = 0; index < batch; index++)
            messages[index] = (struct message){.number = number++};
        put(ring, messages, batch);
        if (number - looked >= 256) {
            looked = number;
            if (now_ns() >= until)
                break;
        }
    }
    messages[0].number = LAST;
    put(ring, messages, 1);
}

void rte_bench_consume(void *ring, uint32_t batch, struct result *result)
{
    struct message messages[BATCH_LIMIT];
    uint64_t expected = 0, begin = 0;
    for (;;) {
        uint32_t count;
        while ((count = rte_ring_sc_dequeue_burst_elem(ring, messages, sizeof *messages, batch, NULL)) == 0)
            rte_pause();
        if (begin == 0)
            begin = now_ns();
        for (uint32_t index = 0; index < count; index++) {
            if (messages[index].number == LAST) {
                result->ns = now_ns() - begin;
                result->count = expected;
                return;
            }
            result->wrong += messages[index].number != expected;
            expected = messages[index].number + 1;
        }
    }
}

static uint64_t take(struct rte_ring *ring)
{
    struct message message;
    while (rte_ring_sc_dequeue_bulk_elem(ring, &message, sizeof message, 1, NULL) == 0)
        rte_pause();
    return message.number;
}

void rte_bench_ask(void *there, void *back, uint64_t duration_ns, struct result *result)
{
    struct message message;
    uint64_t begin = now_ns(), now = begin, number = 0;
    memset(&message, 0, sizeof message);
    while (now - begin < duration_ns) {
        message.number = number;
        put(there, &message, 1);
        result->wrong += take(back) != number;
        number++;
        uint64_t then = now;
        now = now_ns();
        if (result->sample_count < 262144)
            result->samples_ns[result->sample_count++] = (uint32_t)(now - then);
        result->count++;
    }
    result->ns = now - begin;
    message.number = LAST;
    put(there, &message, 1);
}

void rte_bench_answer(void *there, void *back)
{
    struct message message;
    memset(&message, 0, sizeof message);
    while ((message.number = take(there)) != LAST)
        put(back, &message, 1);
}
