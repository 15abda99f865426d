/*
 * nbdload: a load on an NBD server whose contents are decided beforehand, through libnbd. Beside fio, which repeats recent
 * buffers where it shall write duplicates: here a plan says for each request where it goes and which content it has.
 *
 *   nbdload KEY=VALUE...
 *     uri=URI
 *     op=read|write|flush        flush: one, no plan
 *     plan=FILE                  struct step, as many as there are; carried out in order, once
 *     pool=FILE                  contents: whole blocks of 4 KiB
 *     block=BYTES                of each request: 512 bytes to 32 MiB (writes: a multiple of 4096)
 *     depth=N                    requests in flight, 1 to 1024
 *     seconds=S                  stops submitting after that; 0: at the plan's end
 *     end=flush                  a flush after the last reply, within the measured time
 *
 * Content: block i of a request of identity n is block m % pool of the pool, with m = n * blocks per request + i in its first
 * eight bytes (little-endian). So different identities are different contents for every deduplication by blocks, and
 * the pool is small enough to lie in the processor's cache: the generator makes 4 KiB in some 0.1 µs.
 *
 * Prints one JSON object: requests, bytes, seconds (first submission to last completion or flush), cpu_s (this process: it must not
 * be the bottleneck), flush_s, latencies in ns (p50, p99, p999, max; of a histogram with 64 steps per power of two).
 * Exit status: 0, 1 an error of the server or of libnbd, 2 usage.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <libnbd.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define CONTENT_BYTES 4096u
#define DEPTH_LIMIT 1024
#define BLOCK_LIMIT (32u << 20)
#define SUB_BITS 6 /* 64 steps per power of two: a latency is off by 1.6 % at most */
#define BUCKETS (64 << SUB_BITS)

struct step {
    uint64_t offset;
    uint64_t identity;
};

struct slot {
    struct load *load;
    char *buffer;
    uint64_t begun_ns;
    uint32_t index;
};

struct load {
    struct nbd_handle *nbd;
    bool writes;
    uint32_t block, depth;
    const struct step *plan;
    uint64_t plan_steps, next_step;
    const char *pool;
    uint64_t pool_blocks;
    uint64_t until_ns, last_ns;
    uint64_t done;
    struct slot slots[DEPTH_LIMIT];
    uint32_t free[DEPTH_LIMIT], free_count;
    uint64_t histogram[BUCKETS], max_ns;
};

static void usage(const char *what, const char *value)
{
    fprintf(stderr, "nbdload: %s%s%s\n", what, value ? ": " : "", value ? value : "");
    exit(2);
}

static void fail(const char *what)
{
    fprintf(stderr, "nbdload: %s: %s\n", what, nbd_get_error());
    exit(1);
}

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* --- Latencies ---------------------------------------------------------------------------------------------------- */

static uint32_t bucket_of(uint64_t ns)
{
    if (ns < 1u << SUB_BITS)
        return (uint32_t)ns;
    uint32_t power = 63u - (uint32_t)__builtin_clzll(ns) - SUB_BITS;
    return ((power + 1) << SUB_BITS) + (uint32_t)((ns >> power) & ((1u << SUB_BITS) - 1));
}

static uint64_t middle_of(uint32_t bucket)
{
    if (bucket < 1u << SUB_BITS)
        return bucket;
    uint32_t power = (bucket >> SUB_BITS) - 1;
    uint64_t low = ((uint64_t)(1u << SUB_BITS) + (bucket & ((1u << SUB_BITS) - 1))) << power;
    return low + (((uint64_t)1 << power) >> 1);
}

static uint64_t percentile(const struct load *load, double share)
{
    uint64_t wanted = (uint64_t)((double)load->done * share), seen = 0;
    for (uint32_t bucket = 0; bucket < BUCKETS; bucket++)
        if ((seen += load->histogram[bucket]) > wanted)
            return middle_of(bucket);
    return load->max_ns;
}

/* --- The load ----------------------------------------------------------------------------------------------------- */

static void fill(struct load *load, char *buffer, uint64_t identity)
{
    uint64_t first = identity * (load->block / CONTENT_BYTES);
    for (uint32_t index = 0; index < load->block / CONTENT_BYTES; index++) {
        uint64_t content = first + index;
        memcpy(buffer, load->pool + content % load->pool_blocks * CONTENT_BYTES, CONTENT_BYTES);
        memcpy(buffer, &content, sizeof content);
        buffer += CONTENT_BYTES;
    }
}

static int completed(void *opaque, int *error)
{
    struct slot *slot = opaque;
    struct load *load = slot->load;
    if (*error != 0) {
        fprintf(stderr, "nbdload: request %" PRIu64 ": %s\n", load->done, strerror(*error));
        exit(1);
    }
    uint64_t now = now_ns(), ns = now - slot->begun_ns;
    load->histogram[bucket_of(ns)]++;
    if (ns > load->max_ns)
        load->max_ns = ns;
    load->last_ns = now;
    load->done++;
    load->free[load->free_count++] = slot->index;
    return 1; /* retired: the handle forgets it */
}

/* False at the end of the plan or of the time. */
static bool submit(struct load *load)
{
    uint64_t now = now_ns();
    if (load->next_step == load->plan_steps || (load->until_ns != 0 && now >= load->until_ns))
        return false;
    const struct step *step = &load->plan[load->next_step++];
    struct slot *slot = &load->slots[load->free[--load->free_count]];
    nbd_completion_callback callback = {.callback = completed, .user_data = slot};
    if (load->writes)
        fill(load, slot->buffer, step->identity);
    slot->begun_ns = now;
    int64_t cookie = load->writes ? nbd_aio_pwrite(load->nbd, slot->buffer, load->block, step->offset, callback, 0)
                                  : nbd_aio_pread(load->nbd, slot->buffer, load->block, step->offset, callback, 0);
    if (cookie < 0)
        fail("submitting a request");
    return true;
}

static void run(struct load *load)
{
    bool more = true;
    for (;;) {
        while (more && load->free_count > 0)
            more = submit(load);
        if (load->free_count == load->depth)
            return;
        if (nbd_poll(load->nbd, -1) < 0)
            fail("waiting for replies");
    }
}

/* --- Arguments ---------------------------------------------------------------------------------------------------- */

static const void *map_file(const char *name, uint64_t unit, uint64_t *count)
{
    int fd = open(name, O_RDONLY | O_CLOEXEC);
    struct stat status;
    if (fd < 0 || fstat(fd, &status) < 0)
        usage(name, strerror(errno));
    if (status.st_size == 0 || (uint64_t)status.st_size % unit != 0)
        usage("size is no multiple of its unit", name);
    void *memory = mmap(0, (size_t)status.st_size, PROT_READ, MAP_PRIVATE | MAP_POPULATE, fd, 0);
    if (memory == MAP_FAILED)
        usage(name, strerror(errno));
    close(fd);
    *count = (uint64_t)status.st_size / unit;
    return memory;
}

static uint64_t number(const char *key, const char *text, uint64_t least, uint64_t most)
{
    char *end;
    errno = 0;
    uint64_t value = strtoull(text, &end, 10);
    if (errno != 0 || *text < '0' || *text > '9' || *end != 0 || value < least || value > most)
        usage(key, text);
    return value;
}

int main(int count, char **arguments)
{
    static struct load load;
    const char *uri = 0, *op = 0, *plan = 0, *pool = 0;
    bool flush_at_end = false;
    double seconds = 0;
    load.block = 4096;
    load.depth = 1;
    for (int index = 1; index < count; index++) {
        char *value = strchr(arguments[index], '=');
        if (value == 0)
            usage("expected KEY=VALUE, got", arguments[index]);
        *value++ = 0;
        const char *key = arguments[index];
        if (strcmp(key, "uri") == 0)
            uri = value;
        else if (strcmp(key, "op") == 0)
            op = value;
        else if (strcmp(key, "plan") == 0)
            plan = value;
        else if (strcmp(key, "pool") == 0)
            pool = value;
        else if (strcmp(key, "block") == 0)
            load.block = (uint32_t)number(key, value, 512, BLOCK_LIMIT);
        else if (strcmp(key, "depth") == 0)
            load.depth = (uint32_t)number(key, value, 1, DEPTH_LIMIT);
        else if (strcmp(key, "end") == 0 && strcmp(value, "flush") == 0)
            flush_at_end = true;
        else if (strcmp(key, "seconds") == 0) {
            char *end;
            seconds = strtod(value, &end);
            if (end == value || *end != 0 || !(seconds >= 0 && seconds <= 86400))
                usage(key, value);
        } else
            usage("unknown key", key);
    }
    if (uri == 0 || op == 0)
        usage("uri and op are needed", 0);
    bool flush = strcmp(op, "flush") == 0;
    load.writes = strcmp(op, "write") == 0;
    if (!flush && !load.writes && strcmp(op, "read") != 0)
        usage("op is read, write or flush, not", op);
    if (!flush && plan == 0)
        usage("a plan is needed to", op);
    if (load.writes && (pool == 0 || load.block % CONTENT_BYTES != 0))
        usage("writes need a pool and whole blocks of 4096 bytes", 0);
    if (!flush)
        load.plan = map_file(plan, sizeof *load.plan, &load.plan_steps);
    if (load.writes)
        load.pool = map_file(pool, CONTENT_BYTES, &load.pool_blocks);

    load.nbd = nbd_create();
    if (load.nbd == 0 || nbd_set_uri_allow_local_file(load.nbd, false) < 0 || nbd_connect_uri(load.nbd, uri) < 0)
        fail(uri);
    for (uint32_t index = 0; !flush && index < load.depth; index++) {
        load.slots[index] = (struct slot){.load = &load, .index = index};
        if (posix_memalign((void **)&load.slots[index].buffer, 4096, load.block) != 0)
            usage("out of memory", 0);
        memset(load.slots[index].buffer, 1, load.block);
        load.free[load.free_count++] = index;
    }

    struct rusage before, after;
    getrusage(RUSAGE_SELF, &before);
    uint64_t begun = now_ns();
    double flush_s = 0;
    load.last_ns = begun;
    load.until_ns = seconds > 0 ? begun + (uint64_t)(seconds * 1e9) : 0;
    if (!flush)
        run(&load);
    if (flush || flush_at_end) {
        uint64_t last = now_ns();
        if (nbd_flush(load.nbd, 0) < 0)
            fail("flush");
        load.last_ns = now_ns();
        flush_s = (double)(load.last_ns - last) / 1e9;
    }
    getrusage(RUSAGE_SELF, &after);
    double cpu_s = (double)(after.ru_utime.tv_sec - before.ru_utime.tv_sec + after.ru_stime.tv_sec - before.ru_stime.tv_sec) +
                   (double)(after.ru_utime.tv_usec - before.ru_utime.tv_usec + after.ru_stime.tv_usec - before.ru_stime.tv_usec) / 1e6;
    printf("{\"requests\": %" PRIu64 ", \"bytes\": %" PRIu64 ", \"seconds\": %.9f, \"cpu_s\": %.6f, \"flush_s\": %.9f, "
           "\"p50_ns\": %" PRIu64 ", \"p99_ns\": %" PRIu64 ", \"p999_ns\": %" PRIu64 ", \"max_ns\": %" PRIu64 "}\n",
           load.done, load.done * load.block, (double)(load.last_ns - begun) / 1e9, cpu_s, flush_s,
           percentile(&load, 0.5), percentile(&load, 0.99), percentile(&load, 0.999), load.max_ns);
    if (nbd_shutdown(load.nbd, 0) < 0)
        fail("shutdown");
    nbd_close(load.nbd);
    return 0;
}
