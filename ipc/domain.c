/* See domain.h. */
#define _GNU_SOURCE
#include "ipc/domain.h"

#include "ipc/control.h"
#include "ipc/crashpoint.h"
#include "ipc/spin.h"

#include <errno.h>
#include <linux/futex.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static uint64_t page_up(uint64_t bytes) { return (bytes + ATOLL_PAGE_BYTES - 1) & ~(uint64_t)(ATOLL_PAGE_BYTES - 1); }

uint64_t atoll_now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* --- Layout ------------------------------------------------------------------------------------------------------ */

struct plan {
    uint64_t journal_offset, tx_offset[ATOLL_ROLE_COUNT], control_offset, role_offset, buffer_offset, arena_bytes;
};

static struct plan plan_of(uint32_t rings_to, const uint32_t *entries, uint64_t role_bytes, uint64_t buffer_bytes)
{
    struct plan plan = {0};
    uint64_t offset = ATOLL_TRACE_OFFSET + ATOLL_TRACE_ENTRIES * sizeof(struct atoll_trace_record);
    plan.journal_offset = page_up(offset);
    offset = page_up(plan.journal_offset + sizeof(struct atoll_journal));
    for (uint32_t role = 0; role < ATOLL_ROLE_COUNT; role++) {
        if (!(rings_to >> role & 1))
            continue;
        assert(entries[role] != 0 && (entries[role] & (entries[role] - 1)) == 0);
        plan.tx_offset[role] = offset;
        offset = page_up(offset + ATOLL_PAGE_BYTES + (uint64_t)entries[role] * sizeof(struct atoll_descriptor));
    }
    plan.control_offset = offset;
    plan.role_offset = page_up(offset + ATOLL_CONTROL_BYTES);
    plan.buffer_offset = page_up(plan.role_offset + role_bytes);
    plan.arena_bytes = page_up(plan.buffer_offset + buffer_bytes);
    return plan;
}

uint64_t atoll_arena_size(uint32_t rings_to, const uint32_t *entries, uint64_t role_bytes, uint64_t buffer_bytes)
{
    return plan_of(rings_to, entries, role_bytes, buffer_bytes).arena_bytes;
}

uint64_t atoll_arena_format(void *arena, uint32_t role, uint64_t instance, uint64_t arena_bytes, uint32_t rings_to,
                            const uint32_t *entries, uint64_t role_bytes, uint64_t buffer_bytes, uint32_t wake_kind,
                            int32_t eventfd)
{
    struct plan plan = plan_of(rings_to, entries, role_bytes, buffer_bytes);
    struct atoll_arena_header *header = arena;
    assert(role > 0 && role < ATOLL_ROLE_COUNT && plan.arena_bytes <= arena_bytes && arena_bytes <= ATOLL_MAP_STRIDE);
    header->layout_version = ATOLL_LAYOUT_VERSION;
    header->role = role;
    header->instance = instance;
    header->arena_bytes = arena_bytes;
    header->wake_kind = wake_kind;
    header->eventfd = eventfd;
    header->journal_offset = plan.journal_offset;
    header->control_offset = plan.control_offset;
    header->role_offset = plan.role_offset;
    header->role_bytes = role_bytes;
    header->buffer_offset = plan.buffer_offset;
    header->buffer_bytes = buffer_bytes;
    for (uint32_t peer = 0; peer < ATOLL_ROLE_COUNT; peer++) {
        header->tx_offset[peer] = plan.tx_offset[peer];
        if (plan.tx_offset[peer] == 0)
            continue;
        struct atoll_ring_producer *producer = (void *)((char *)arena + plan.tx_offset[peer]);
        producer->entry_count = entries[peer];
        producer->consumer_role = peer;
    }
    atoll_compiler_barrier();
    header->magic = ATOLL_ARENA_MAGIC;
    return plan.role_offset;
}

/* --- Opening ----------------------------------------------------------------------------------------------------- */

/* Checks a ring whose producer half lies in `arena`, which may be another domain's. Returns 0 if it is not there. */
static const struct atoll_ring_producer *find_producer(const struct atoll_arena_header *arena, uint64_t arena_bytes,
                                                       uint32_t consumer_role, uint32_t *entry_count)
{
    uint64_t offset = arena->tx_offset[consumer_role];
    if (offset == 0)
        return 0;
    if (offset % ATOLL_PAGE_BYTES != 0 || offset > arena_bytes - ATOLL_PAGE_BYTES)
        return 0;
    const struct atoll_ring_producer *producer = (const void *)((const char *)arena + offset);
    uint32_t count = producer->entry_count;
    if (count == 0 || (count & (count - 1)) != 0 || producer->consumer_role != consumer_role ||
        (uint64_t)count * sizeof(struct atoll_descriptor) > arena_bytes - offset - ATOLL_PAGE_BYTES)
        return 0;
    *entry_count = count;
    return producer;
}

/* How the owner of `arena` is woken. It says so itself, so what it names must really be an eventfd: a damaged header must not
 * make us write into a device or a socket (I8). */
static int32_t find_eventfd(const struct atoll_arena_header *arena)
{
    char path[32], target[32];
    if (arena->wake_kind != ATOLL_WAKE_EVENTFD)
        return -1;
    int32_t fd = arena->eventfd;
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(path, target, sizeof target);
    static const char expected[] = "anon_inode:[eventfd]";
    if (fd < 0 || length != sizeof expected - 1 || memcmp(target, expected, sizeof expected - 1) != 0)
        return -2;
    return fd;
}

int atoll_domain_open(struct atoll_domain *domain, uint32_t role, uint32_t incarnation, uint32_t pid,
                      uint64_t start_time, const uint64_t *arena_bytes, char *error)
{
    struct atoll_arena_header *self = (void *)(uintptr_t)atoll_arena_address(role);

    memset(domain, 0, sizeof *domain);
    domain->rings = calloc(1, sizeof *domain->rings);
    if (domain->rings == 0) {
        snprintf(error, 256, "out of memory");
        return -ENOMEM;
    }
    domain->rings->epoll = -1;
    domain->role = role;
    domain->incarnation = incarnation;
    domain->self = self;
    if (self->magic != ATOLL_ARENA_MAGIC || self->layout_version != ATOLL_LAYOUT_VERSION || self->role != role) {
        snprintf(error, 256, "arena of role %u: magic %llx, layout version %u, role %u are not those of this program", role,
                 (unsigned long long)self->magic, self->layout_version, self->role);
        return -EINVAL;
    }
    if (arena_bytes[ATOLL_ROLE_KERNEL] == 0) { /* crash points and traces are armed there */
        snprintf(error, 256, "the kernel's arena is missing from the map");
        return -EINVAL;
    }
    domain->counters = (void *)((char *)self + ATOLL_COUNTERS_OFFSET);
    domain->journal = (void *)((char *)self + self->journal_offset);
    atoll_roll_back(domain->journal);

    self->state = ATOLL_STATE_RECOVERING;
    atoll_store_release(&self->incarnation, incarnation); /* who sees it sees the state above, or a later one */
    self->pid = pid;
    self->start_time = start_time;
    self->sleeping = 0;

    for (uint32_t peer = 0; peer < ATOLL_ROLE_COUNT; peer++) {
        domain->peer_bytes[peer] = arena_bytes[peer];
        if (arena_bytes[peer] == 0)
            continue;
        const struct atoll_arena_header *arena = (const void *)(uintptr_t)atoll_arena_address(peer);
        domain->peers[peer] = arena;
        domain->rings->eventfd[peer] = find_eventfd(arena);
        uint32_t count = 0;
        const struct atoll_ring_producer *producer = find_producer(self, arena_bytes[role], peer, &count);
        if (producer != 0) {
            struct atoll_tx_ring *tx = &domain->rings->tx[peer];
            tx->producer = (void *)((char *)self + self->tx_offset[peer]);
            tx->consumer = &arena->consumer[role];
            tx->entries = (void *)((char *)tx->producer + ATOLL_PAGE_BYTES);
            tx->mask = count - 1;
            tx->tail = tx->limit = tx->published = tx->producer->tail_committed;
            atoll_store_release(&tx->producer->tail, tx->tail);
            domain->rings->tx_roles |= 1u << peer;
        }
        producer = find_producer(arena, arena_bytes[peer], role, &count);
        if (producer != 0) {
            struct atoll_rx_ring *rx = &domain->rings->rx[peer];
            rx->producer = producer;
            rx->consumer = &self->consumer[peer];
            rx->entries = (const void *)((const char *)producer + ATOLL_PAGE_BYTES);
            rx->mask = count - 1;
            rx->head = rx->published = rx->cached_tail = rx->seen_tail = rx->consumer->head_committed;
            atoll_store_release(&rx->consumer->head, rx->head); /* SP-HEAD */
            domain->rings->rx_roles |= 1u << peer;
        }
    }
    return 0;
}

void atoll_domain_serving(struct atoll_domain *domain)
{
    domain->self->serving_ns = atoll_now_ns();
    atoll_store_release(&domain->self->state, ATOLL_STATE_SERVING);
    atoll_domain_wake_all(domain);
}

/* Values of `sleeping`. What neither of them is counts as ASLEEP. */
enum { AWAKE = 0, ASLEEP = 1, DOZING = 2 };

/* --- Waking and sleeping ----------------------------------------------------------------------------------------- */

static void wake(struct atoll_domain *domain, uint32_t role)
{
    int32_t eventfd = domain->rings->eventfd[role];
    if (eventfd >= 0) {
        uint64_t one = 1;
        /* EAGAIN: the counter is full, so the peer is woken already. */
        ssize_t ignored = write(eventfd, &one, sizeof one);
        (void)ignored;
    } else if (eventfd == -1 && domain->rings->tx[role].producer != 0) {
        syscall(SYS_futex, &domain->rings->tx[role].producer->tail, FUTEX_WAKE, 1, 0, 0, 0);
    }
}

void atoll_domain_commit(struct atoll_domain *domain)
{
    struct atoll_rings *rings = domain->rings;
    uint32_t published = 0, hurried = 0;
    for (uint32_t left = rings->rx_roles; left != 0; left &= left - 1)
        atoll_ring_settle_head(domain->journal, &rings->rx[__builtin_ctz(left)]);
    for (uint32_t left = rings->tx_roles; left != 0; left &= left - 1)
        atoll_ring_settle_tail(domain->journal, &rings->tx[__builtin_ctz(left)]);
    rings->worked |= domain->journal->count != 0;
    ATOLL_CRASH_POINT_EACH(domain, "commit.before");
    atoll_commit(domain->journal);
    ATOLL_CRASH_POINT_EACH(domain, "commit.after");
    for (uint32_t left = rings->rx_roles; left != 0; left &= left - 1)
        atoll_ring_publish_head(&rings->rx[__builtin_ctz(left)]);
    for (uint32_t left = rings->tx_roles; left != 0; left &= left - 1) {
        uint32_t role = (uint32_t)__builtin_ctz(left);
        uint32_t fresh = rings->tx[role].tail - rings->tx[role].published;
        if (!atoll_ring_publish_tail(&rings->tx[role]))
            continue;
        published |= 1u << role;
        hurried |= fresh != rings->unhurried[role] ? 1u << role : 0;
        rings->unhurried[role] = 0;
    }
    if (published == 0)
        return;
    ATOLL_CRASH_POINT_EACH(domain, "publish.after");
    atoll_full_fence(); /* SP-SLEEP */
    for (; published != 0; published &= published - 1) {
        uint32_t role = (uint32_t)__builtin_ctz(published);
        uint32_t sleeping = atoll_load_relaxed(&domain->peers[role]->sleeping);
        if (sleeping == 0)
            continue;
        const struct atoll_tx_ring *ring = &rings->tx[role];
        if (sleeping != DOZING || (hurried >> role & 1) ||
            ring->tail - atoll_load_relaxed(&ring->consumer->head) >= ATOLL_DOZE_MESSAGES)
            wake(domain, role);
    }
    ATOLL_CRASH_POINT_EACH(domain, "wake.after");
}

void atoll_domain_wake_all(struct atoll_domain *domain)
{
    atoll_full_fence();
    for (uint32_t role = 1; role < ATOLL_ROLE_COUNT; role++)
        if (domain->peers[role] != 0 && role != domain->role)
            wake(domain, role);
}

uint32_t atoll_domain_pending(struct atoll_domain *domain, uint32_t role)
{
    return atoll_ring_available(&domain->rings->rx[role]);
}

bool atoll_domain_anything_pending(struct atoll_domain *domain, uint32_t ignored_roles)
{
    for (uint32_t role = 1; role < ATOLL_ROLE_COUNT; role++)
        if (!(ignored_roles >> role & 1) && atoll_domain_pending(domain, role) != 0)
            return true;
    return false;
}

bool atoll_domain_may_sleep(struct atoll_domain *domain, uint32_t ignored_roles)
{
    atoll_store_relaxed(&domain->self->sleeping, ASLEEP);
    atoll_full_fence(); /* SP-SLEEP */
    if (!atoll_domain_anything_pending(domain, ignored_roles))
        return true;
    atoll_domain_awake(domain);
    return false;
}

void atoll_domain_set_spin(struct atoll_domain *domain, uint64_t spin_ns) { domain->rings->spin_ns = spin_ns; }

void atoll_domain_awake(struct atoll_domain *domain) { atoll_store_relaxed(&domain->self->sleeping, AWAKE); }

/* No descriptor is to be had: the caller looks again soon, as if something had come. */
static int nap(void) { return clock_nanosleep(CLOCK_MONOTONIC, 0, &(struct timespec){.tv_nsec = 1000000}, 0) == 0; }

/* By the own eventfd, in an epoll set that reports it when it is written to: so it need not be read, and one system call is all.
 * (A futex wait on words of peers costs several times that: the operating system looks each page up the slow way, because it is
 * mapped read-only.) */
static int sleep_in_epoll(struct atoll_domain *domain, int64_t timeout_ns)
{
    struct atoll_rings *rings = domain->rings;
    struct epoll_event event = {.events = EPOLLIN | EPOLLET};
    if (rings->epoll < 0) {
        rings->epoll = epoll_create1(EPOLL_CLOEXEC);
        if (rings->epoll < 0 || epoll_ctl(rings->epoll, EPOLL_CTL_ADD, rings->eventfd[domain->role], &event) < 0) {
            if (rings->epoll >= 0)
                close(rings->epoll);
            rings->epoll = -1;
            return nap();
        }
    }
    struct timespec timeout = {.tv_sec = timeout_ns / 1000000000, .tv_nsec = timeout_ns % 1000000000};
    int count = epoll_pwait2(rings->epoll, &event, 1, timeout_ns < 0 ? 0 : &timeout, 0);
    if (count < 0 && errno == ENOSYS) /* before Linux 5.11 */
        count = epoll_wait(rings->epoll, &event, 1, timeout_ns < 0 ? -1 : (int)((timeout_ns + 999999) / 1000000));
    return count >= 0 ? count : errno == EINTR ? 1 : nap();
}

static int sleep_on_tails(struct atoll_domain *domain, uint32_t ignored_roles, int64_t timeout_ns)
{
    struct futex_waitv waiters[ATOLL_ROLE_COUNT];
    uint32_t count = 0;
    struct timespec until, *deadline = 0;

    for (uint32_t role = 1; role < ATOLL_ROLE_COUNT; role++) {
        struct atoll_rx_ring *ring = &domain->rings->rx[role];
        if (ring->consumer == 0 || (ignored_roles >> role & 1))
            continue;
        /* Nothing pending at the tail as last seen. Should it move now, futex_waitv returns at once. */
        waiters[count++] = (struct futex_waitv){
            .val = ring->seen_tail, .uaddr = (uintptr_t)&ring->producer->tail, .flags = FUTEX_32};
    }
    if (timeout_ns >= 0) {
        uint64_t at = atoll_now_ns() + (uint64_t)timeout_ns;
        until = (struct timespec){.tv_sec = (time_t)(at / 1000000000u), .tv_nsec = (long)(at % 1000000000u)};
        deadline = &until;
    }
    long result = -1;
    int error = ETIMEDOUT;
    if (count > 0) {
        result = syscall(SYS_futex_waitv, waiters, count, 0, deadline, CLOCK_MONOTONIC);
        error = errno;
    } else { /* every ring is ignored: only time passes */
        assert(deadline != 0);
        error = clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, deadline, 0) == 0 ? ETIMEDOUT : EINTR;
    }
    return !(result < 0 && error == ETIMEDOUT);
}

/* Put with atoll_domain_put_unhurried. (NO_HOLE of a ZERO is the same bit.) */
static bool is_unhurried(const struct atoll_descriptor *message)
{
    return (atoll_load_relaxed(&message->flags) & ATOLL_FLAG_POSTED) && atoll_load_relaxed(&message->opcode) != ATOLL_OP_ZERO;
}

/* True if all that waits on the ring from `role` may go on waiting. */
static bool may_wait(struct atoll_domain *domain, uint32_t role)
{
    const struct atoll_rx_ring *ring = &domain->rings->rx[role];
    uint32_t count = atoll_ring_waiting(ring);
    if (count >= ATOLL_DOZE_MESSAGES)
        return false;
    for (uint32_t index = 0; index < count; index++)
        if (!is_unhurried(atoll_ring_entry(ring, index)))
            return false;
    return true;
}

int atoll_domain_doze(struct atoll_domain *domain, uint32_t roles, int64_t timeout_ns)
{
    atoll_store_relaxed(&domain->self->sleeping, DOZING);
    atoll_full_fence(); /* SP-SLEEP */
    bool waits = atoll_domain_anything_pending(domain, roles);
    for (uint32_t left = roles; left != 0 && !waits; left &= left - 1)
        waits = !may_wait(domain, (uint32_t)__builtin_ctz(left));
    int result = 1;
    if (!waits)
        result = sleep_in_epoll(domain, timeout_ns); /* on the tails it would wake up at once */
    atoll_domain_awake(domain);
    return result != 0;
}

int atoll_domain_sleep(struct atoll_domain *domain, uint32_t ignored_roles, int64_t timeout_ns)
{
    if (atoll_domain_spin(domain, &domain->rings->spin, ignored_roles, 0, 0) ||
        !atoll_domain_may_sleep(domain, ignored_roles))
        return 1;
    int result = domain->rings->eventfd[domain->role] < 0 ? sleep_on_tails(domain, ignored_roles, timeout_ns)
                                                          : sleep_in_epoll(domain, timeout_ns);
    atoll_domain_awake(domain);
    return result != 0;
}

/* --- Messages ---------------------------------------------------------------------------------------------------- */

uint32_t atoll_copy_data(const struct atoll_domain *domain, const struct atoll_descriptor *message, uint64_t bytes, uint32_t most,
                         struct atoll_segment *data)
{
    uint32_t count = message->segment_count;
    uint64_t total = 0;
    if (count == 0) {
        data[count++] = (struct atoll_segment){.address = message->address, .length = message->length, .kind = ATOLL_SEGMENT_DATA};
    } else {
        if (count > most || !atoll_reference_in(domain, ATOLL_ROLE_DEDUP, message->address, count * sizeof *data))
            return 0;
        memcpy(data, (const void *)(uintptr_t)message->address, count * sizeof *data);
    }
    for (uint32_t index = 0; index < count; index++) {
        if (data[index].length == 0 || data[index].kind > ATOLL_SEGMENT_HOLE)
            return 0;
        total += data[index].length;
    }
    return total == bytes ? count : 0;
}

static void trace_record(struct atoll_domain *domain, uint32_t peer, uint32_t direction,
                         const struct atoll_descriptor *message, uint64_t address, uint32_t length)
{
    struct atoll_trace_record *records = (void *)((char *)domain->self + ATOLL_TRACE_OFFSET);
    struct atoll_trace_record *record = &records[domain->self->trace_next % ATOLL_TRACE_ENTRIES];
    *record = (struct atoll_trace_record){.time_ns = atoll_now_ns(),
                                          .identity = message->identity,
                                          .address = address,
                                          .length = length,
                                          .opcode = message->opcode,
                                          .peer = (uint8_t)peer,
                                          .direction = (uint8_t)direction,
                                          .flags = message->flags};
    memcpy(record->words, message->words, sizeof record->words);
    atoll_store_release(&domain->self->trace_next, domain->self->trace_next + 1);
}

/* A scattered payload leaves one record per segment, so that the trace shows where its bytes lie, not where the list does. */
void atoll_trace_hop(struct atoll_domain *domain, uint32_t peer, uint32_t direction, const struct atoll_descriptor *message)
{
    uint32_t count = message->segment_count;
    if (message->opcode == ATOLL_OP_GIVE_BACK || count > ATOLL_REPLY_SEGMENTS ||
        atoll_reference_role(domain, message->address, count * sizeof(struct atoll_segment)) == 0)
        count = 0;
    if (count == 0)
        trace_record(domain, peer, direction, message, message->address, message->length);
    for (uint32_t index = 0; index < count; index++) {
        struct atoll_segment segment = ((const struct atoll_segment *)(uintptr_t)message->address)[index];
        trace_record(domain, peer, direction, message, segment.address, segment.length);
    }
}

/* --- Control (control.h) ----------------------------------------------------------------------------------------- */

void atoll_domain_set64(struct atoll_domain *domain, uint64_t *word, uint64_t value)
{
    assert(atoll_reference_in(domain, domain->role, (uintptr_t)word, sizeof *word));
    atoll_set64(domain->journal, word, value);
}

uint64_t atoll_domain_changes(const struct atoll_domain *domain)
{
    const struct atoll_rings *rings = domain->rings;
    uint64_t changes = domain->journal->count;
    for (uint32_t left = rings->tx_roles; left != 0; left &= left - 1)
        changes += rings->tx[__builtin_ctz(left)].tail - rings->tx[__builtin_ctz(left)].published;
    for (uint32_t left = rings->rx_roles; left != 0; left &= left - 1)
        changes += rings->rx[__builtin_ctz(left)].head - rings->rx[__builtin_ctz(left)].published;
    return changes;
}

void atoll_domain_roll_back(struct atoll_domain *domain)
{
    struct atoll_rings *rings = domain->rings;
    atoll_roll_back(domain->journal);
    for (uint32_t left = rings->rx_roles; left != 0; left &= left - 1)
        atoll_ring_return_head(&rings->rx[__builtin_ctz(left)]);
    for (uint32_t left = rings->tx_roles; left != 0; left &= left - 1)
        atoll_ring_return_tail(&rings->tx[__builtin_ctz(left)]);
    memset(rings->unhurried, 0, sizeof rings->unhurried);
}

uint32_t atoll_domain_next_entry(const struct atoll_domain *domain, uint32_t role)
{
    const struct atoll_tx_ring *ring = &domain->rings->tx[role];
    return ring->tail & ring->mask;
}

uint32_t atoll_domain_room(struct atoll_domain *domain, uint32_t role)
{
    return atoll_ring_room(&domain->rings->tx[role]);
}

int atoll_arena_adopt(uint32_t role, uint64_t instance, uint64_t arena_bytes, uint32_t rings_to,
                      const uint32_t *entries, uint64_t role_bytes, uint64_t buffer_bytes, uint32_t wake_kind,
                      int32_t eventfd)
{
    struct plan plan = plan_of(rings_to, entries, role_bytes, buffer_bytes);
    struct atoll_arena_header *header = (void *)(uintptr_t)atoll_arena_address(role);

    if (header->magic != ATOLL_ARENA_MAGIC || header->layout_version != ATOLL_LAYOUT_VERSION || header->role != role ||
        header->arena_bytes != arena_bytes || header->journal_offset != plan.journal_offset ||
        header->control_offset != plan.control_offset || header->role_offset != plan.role_offset ||
        header->role_bytes != role_bytes || header->buffer_offset != plan.buffer_offset ||
        header->buffer_bytes != buffer_bytes ||
        memcmp(header->tx_offset, plan.tx_offset, sizeof plan.tx_offset) != 0)
        return -EINVAL;
    atoll_roll_back((void *)((char *)header + header->journal_offset));
    /* From here on each store may be repeated by another adoption, should this one be interrupted. */
    memset(header->consumer, 0, sizeof header->consumer);
    for (uint32_t peer = 0; peer < ATOLL_ROLE_COUNT; peer++) {
        if (plan.tx_offset[peer] == 0)
            continue;
        struct atoll_ring_producer *producer = (void *)((char *)header + plan.tx_offset[peer]);
        *producer = (struct atoll_ring_producer){.entry_count = entries[peer], .consumer_role = peer};
        struct atoll_descriptor *entry = (void *)((char *)producer + ATOLL_PAGE_BYTES);
        for (uint32_t index = 0; index < entries[peer]; index++) /* positions begin anew: what was ready long ago is not */
            entry[index].ready = index;
    }
    memset((char *)header + header->control_offset, 0, ATOLL_CONTROL_HEADER_BYTES);
    header->crash_point = header->crash_sequence = header->crash_seen = 0;
    header->trace_armed = header->current = 0;
    header->sleeping = header->pid = 0;
    header->start_time = header->serving_ns = 0;
    header->state = ATOLL_STATE_NEW;
    header->wake_kind = wake_kind;
    header->eventfd = eventfd;
    header->instance = instance;
    return 0;
}
