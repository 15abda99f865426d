/*
 * The dedup domain: its arena, its main loop, what its Python calls.
 *
 *   role area:   struct atoll_dedup_public    volumes; published
 *                struct dedup_root            sizes the rest was made with
 *                struct io_table
 *                datapath (datapath.h), store (store.h)
 *
 * A turn: completions from the disk first (they free what others wait for), up to 64 requests, commit: they are answered; waiting
 * requests and a piece of destage, commit; then one step of the store with transactions of its own. No system call but to sleep
 * and to wake, and to let others have the processor for a moment when there is always more to do.
 *
 * After a crash: dedup_open of the successor. The common part has rolled the journal back; the arena is as at the last
 * commit, and the rings hold what was not taken yet.
 */
#define _GNU_SOURCE
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>

#include "ipc/crashpoint.h"
#include "services/dedup/datapath.h"

/* Work after which others are let go first; and where requests come one by one, each of which would wait for all of it. */
#define OFFER_NS 20000
#define OFFER_ALONE_NS 8000
/* Requests taken in a turn where they come one by one: a few microseconds. */
#define TAKE_ALONE 16
/* And where destage is behind: so many while it does a step's pieces, with which about as many leave the log. */
#define TAKE_CROWDED 36
/* What is read and compared with its fingerprint in a turn there. */
#define COMPLETE_ALONE_BYTES 131072
/* Whether they do is an average over so many of them, squared because each counts as many. */
#define CROWD_WEIGHT 64
#define CROWD_ALL (CROWD_WEIGHT * CROWD_WEIGHT)
/* How long a posted write may lie before it is applied; and how long after the last one dedup dozes rather than sleeps. */
#define DOZE_NS 1000000
#define DOZE_AFTER_MS 5
#define ROOT_MAGIC 0x746f6f7270756465u

struct dedup_root {
    uint64_t magic;
    struct dedup_config config;
};

struct layout { uint64_t root, io, datapath, store, end; };

static uint64_t page_up(uint64_t bytes) { return (bytes + ATOLL_PAGE_BYTES - 1) & ~(uint64_t)(ATOLL_PAGE_BYTES - 1); }

static struct dp_geometry datapath_geometry(const struct dedup_config *config)
{
    return (struct dp_geometry){.nic_pages = config->nic_pages,
                                .merge_pages = config->merge_pages,
                                .cache_pages = config->cache_pages - STORE_BOUNCE_PAGES - DP_SCRUB_PAGES,
                                .tier_pages = config->tier_places != 0 ? config->tier_pages - TIER_BOUNCE_PAGES : 0,
                                .tier_places = config->tier_places};
}

static struct store_geometry store_geometry(const struct dedup_config *config)
{
    return (struct store_geometry){.device_blocks = config->device_blocks,
                                   .frames = config->metadata_frames,
                                   .fingerprint_slots = config->fingerprint_slots,
                                   .grow = config->grow,
                                   .log_blocks = config->log_blocks};
}

static struct layout layout_of(const struct dedup_config *config)
{
    struct dp_geometry datapath = datapath_geometry(config);
    struct store_geometry store = store_geometry(config);
    struct layout layout;
    layout.root = page_up(sizeof(struct atoll_dedup_public));
    layout.io = page_up(layout.root + sizeof(struct dedup_root));
    layout.datapath = page_up(layout.io + sizeof(struct io_table));
    layout.store = page_up(layout.datapath + datapath_arena_bytes(&datapath));
    layout.end = page_up(layout.store + store_arena_bytes(&store));
    return layout;
}

uint64_t dedup_role_bytes(const struct dedup_config *config) { return layout_of(config).end; }

uint64_t dedup_buffer_bytes(const struct dedup_config *config)
{
    struct dp_geometry geometry = datapath_geometry(config);
    return datapath_buffer_bytes(&geometry);
}

struct dedup *dedup_open(struct atoll_domain *domain, const struct dedup_config *config, bool fresh, bool adopted,
                         bool crashed, bool quarantine, char *error)
{
    char *area = (char *)domain->self + domain->self->role_offset;
    struct dedup_root *root = (void *)(area + page_up(sizeof(struct atoll_dedup_public)));
    struct dedup_config sizes = *config;
    bool made = root->magic != ROOT_MAGIC;
    if (fresh && !made) {
        snprintf(error, 256, "arena is said to be fresh but holds a dedup's state");
        return 0;
    }
    if (!made)
        sizes = root->config;
    struct layout layout = layout_of(&sizes);
    if (layout.end > domain->self->role_bytes) {
        snprintf(error, 256, "role area has %llu bytes, %llu are needed", (unsigned long long)domain->self->role_bytes,
                 (unsigned long long)layout.end);
        return 0;
    }
    struct dedup *dedup = calloc(1, sizeof *dedup);
    if (dedup == 0) {
        snprintf(error, 256, "out of memory");
        return 0;
    }
    dedup->domain = domain;
    dedup->public = (void *)area;
    dedup->io = (void *)(area + layout.io);
    struct dp_geometry geometry = datapath_geometry(&sizes);
    struct store_geometry store = store_geometry(&sizes);
    if (made) /* done again from the beginning if it is cut short: the magic comes last */
        io_format(dedup->io);
    struct datapath *dp = datapath_attach(dedup, area + layout.datapath, &geometry, made, error);
    if (dp == 0) {
        free(dedup);
        return 0;
    }
    destage_configure(dp, config->destage_delay_ms);
    store_attach(dedup, area + layout.store, &store, made);
    posted_attach(dp);
    dp->posted_most = (uint32_t)config->posted_blocks;
    dp->track_blocks = config->track_blocks;
    if (made) {
        root->config = sizes;
        atoll_compiler_barrier();
        *(volatile uint64_t *)&root->magic = ROOT_MAGIC;
    }
    if (crashed)
        datapath_note_suspect(dp);
    domain->self->current = 0;
    dp->arena->handled_count = 0; /* a kill from outside is nobody's fault */
    /* An adoption that has been finished shows: something was sent to the disk, whose ring was empty when it began, or requests
     * have been served since. */
    const struct atoll_ring_producer *ring = domain->rings->tx[ATOLL_ROLE_DISK].producer;
    bool anew = adopted && (ring == 0 || ring->tail_committed == 0) && domain->self->serving_ns == 0;
    if (!made && (anew || dp->arena->adopting)) {
        datapath_adopt(dp, quarantine);
        io_adopt(dedup, quarantine);
        store_reopen(dedup);
        datapath_recover(dp); /* posted writes */
        atoll_set64(domain->journal, &dp->arena->control_number, 0); /* the new kernel counts its calls from 1 */
        atoll_set64(domain->journal, &dp->arena->adopting, 0);
    } else {
        datapath_recover(dp);
    }
    ATOLL_CRASH_POINT(domain, "dedup.recovered");
    atoll_domain_commit(domain);
    log_committed(dp);
    return dedup;
}

/* --- The loop ------------------------------------------------------------------------------------------------------------ */

static bool asked_by_nic(uint32_t role, const struct atoll_descriptor *message)
{
    return role == ATOLL_ROLE_NIC && message->opcode == ATOLL_OP_READ && message->part == ATOLL_PART_NIC;
}

/* Nobody else waited beside it, and it is small: a large one takes longer than what it might wait for. `waiting`: messages on its ring. */
static bool comes_alone(uint32_t role, const struct atoll_descriptor *message, uint32_t waiting)
{
    bool alone = asked_by_nic(role, message) ? waiting <= 1 : (message->flags & ATOLL_FLAG_ALONE) != 0;
    return alone && message->length <= ATOLL_POSTED_WRITE_BLOCKS * ATOLL_BLOCK_BYTES;
}

bool dedup_awaited(const struct dedup *dedup) { return dedup->admitted != 0 || dedup->reads != 0; }

/* Messages on the ring: those of one commit can be seen before its tail has moved. */
static uint32_t messages_from(const struct dedup *dedup, uint32_t role)
{
    uint32_t seen = atoll_domain_pending(dedup->domain, role), waiting = atoll_ring_waiting(&dedup->domain->rings->rx[role]);
    return seen > waiting ? seen : waiting;
}

/* How many of nic's there are up to the last READ; 0: there is none. */
static uint32_t count_to_reads(const struct dedup *dedup)
{
    uint32_t count = messages_from(dedup, ATOLL_ROLE_NIC);
    while (count != 0 && !asked_by_nic(ATOLL_ROLE_NIC, atoll_ring_entry(&dedup->domain->rings->rx[ATOLL_ROLE_NIC], count - 1)))
        count--;
    return count;
}

/* How many of at most `most` messages were taken. */
static uint32_t take_from(struct dedup *dedup, uint32_t role, uint32_t most)
{
    struct atoll_domain *domain = dedup->domain;
    struct datapath *dp = dedup->datapath;
    struct atoll_descriptor message;
    uint32_t waiting = messages_from(dedup, role), seen = atoll_domain_pending(domain, role), taken = 0;
    for (uint32_t index = 0; index < seen && index < most && index < DP_STEP_MESSAGES / 2; index++)
        datapath_expect(dp, atoll_ring_entry(&domain->rings->rx[role], index));
    for (; taken < most && domain->journal->count < DP_STEP_JOURNAL && atoll_domain_take(domain, role, &message); taken++) {
        dedup->crowd += (comes_alone(role, &message, waiting) ? 0 : CROWD_WEIGHT) - dedup->crowd / CROWD_WEIGHT;
        place_note(&dedup->place, &message);
        if (asked_by_nic(role, &message))
            datapath_message(dp, role, &message);
        else if (role == ATOLL_ROLE_NIC)
            posted_message(dp, &message);
        else if (posted_request(&message))
            atoll_count(domain, DEDUP_COUNTER_BAD_REQUESTS, 1);
        else
            datapath_message(dp, role, &message);
    }
    return taken;
}

/*
 * Up to DP_STEP_MESSAGES of them. True if there were any. What nbd passes on may have been asked for by who was told that a write is
 * kept, when it was posted. So nbd's messages are counted, then nic's, and so many of nic's are taken before so many of nbd's.
 */
static bool take_requests(struct dedup *dedup)
{
    struct atoll_domain *domain = dedup->domain;
    struct atoll_rx_ring *rings = domain->rings->rx;
    uint32_t most = dedup->datapath->alone ? TAKE_ALONE : DP_STEP_MESSAGES, posted = 0, others = 0;
    if (dedup->admitted == 0) {
        dedup->admitted = messages_from(dedup, ATOLL_ROLE_NBD);
        dedup->ahead = atoll_ring_waiting(&rings[ATOLL_ROLE_NIC]); /* after that */
    }
    bool crowded = destage_crowded(dedup->datapath);
    dedup->reads = crowded && atoll_load_relaxed(&dedup->datapath->nic_public->asking) ? count_to_reads(dedup) : 0;
    if (crowded && !dedup_awaited(dedup) && most > TAKE_CROWDED)
        most = TAKE_CROWDED; /* of writes that have been answered: nobody waits for them */
    /* None is left when fewer are taken than there is room for, whatever the tails said (I8). */
    if (dedup->ahead != 0 || dedup->admitted == 0) { /* else nbd's are due: those of nic's that came since may have no end */
        posted = take_from(dedup, ATOLL_ROLE_NIC, most);
        bool empty = posted < most && domain->journal->count < DP_STEP_JOURNAL;
        dedup->ahead = empty || posted > dedup->ahead ? 0 : dedup->ahead - posted;
        dedup->reads = posted > dedup->reads ? 0 : dedup->reads - posted;
    }
    if (dedup->ahead == 0 && posted < most) {
        uint32_t due = most - posted < dedup->admitted ? most - posted : dedup->admitted;
        others = take_from(dedup, ATOLL_ROLE_NBD, due);
        bool empty = others < due && domain->journal->count < DP_STEP_JOURNAL;
        dedup->admitted = empty ? 0 : dedup->admitted - others;
    }
    return posted + others != 0;
}

/* What a storage driver has done; where requests come one by one, no more than one of them can wait for. True if there was any. */
static bool take_completions(struct dedup *dedup, uint32_t role)
{
    struct atoll_domain *domain = dedup->domain;
    struct atoll_descriptor message;
    uint64_t bytes = 0, most = dedup->datapath->alone ? COMPLETE_ALONE_BYTES : UINT64_MAX;
    uint32_t taken = 0;
    for (; taken < DP_STEP_MESSAGES && bytes < most && domain->journal->count < DP_STEP_JOURNAL; taken++) {
        if (!atoll_domain_take(domain, role, &message))
            break;
        bytes += io_complete(dedup, role, &message);
    }
    return taken != 0;
}

static void commit(struct dedup *dedup)
{
    posted_end(dedup->datapath);
    ATOLL_CRASH_POINT(dedup->domain, "dedup.step.commit");
    atoll_domain_commit(dedup->domain);
    log_committed(dedup->datapath);
    ATOLL_CRASH_POINT(dedup->domain, "dedup.step.committed");
}

/* `serve`: requests are taken. *wake_ms: look again then at the latest, 0 no timer. True if there may be more to do. */
static bool turn(struct dedup *dedup, bool serve, uint64_t *wake_ms)
{
    struct datapath *dp = dedup->datapath;
    struct atoll_domain *domain = dedup->domain;
    bool did = false;
    domain->self->progress++;
    atoll_count(domain, DEDUP_COUNTER_STEPS, 1);
    dp->now_ms = atoll_now_ns() / 1000000;
    did |= take_completions(dedup, ATOLL_ROLE_DISK);
    did |= take_completions(dedup, ATOLL_ROLE_LLRRM);
    if (serve) {
        dp->asked = take_requests(dedup);
        if (dp->asked) { /* who waits for an answer does not wait for a piece of destage, too */
            give_flush(dp);
            commit(dedup);
            did = true;
        }
        dp->alone = dedup->crowd < CROWD_ALL / 2;
        dp->shared = place_shared(&dedup->place);
        dedup->behind = dp->alone && dp->shared && dp->flush_count == 0;
        did |= datapath_step(dp, wake_ms);
    }
    commit(dedup);
    if (serve)
        posted_begin(dp);
    destage_step_over(dp);
    if (store_step(dedup)) {
        dp->retry = true;
        did = true;
    }
    uint64_t due_ms = store_wake_ms(dedup);
    if (due_ms != 0 && (*wake_ms == 0 || due_ms < *wake_ms))
        *wake_ms = due_ms;
    return did;
}

bool dedup_turn(struct dedup *dedup)
{
    uint64_t wake_ms = 0;
    return turn(dedup, true, &wake_ms);
}

/* Progress of a goal beyond serving. Returns 0 while it is not reached. */
struct goal {
    uint32_t kind, phase;
    uint64_t posted;          /* order of the last write that had been posted when it was set */
    uint64_t ticket, failures;
    uint32_t volume;          /* of DEDUP_GOAL_MAP: [lba, end) is still to be looked up */
    uint64_t lba, end;
    uint64_t *values;
    uint8_t *fast;
};

/* Leaf by leaf: not all need fit into memory at once. */
static int look_at_map(struct dedup *dedup, struct goal *goal)
{
    while (goal->lba < goal->end) {
        uint64_t last = (goal->lba | 511) + 1;
        uint32_t count = (uint32_t)((last < goal->end ? last : goal->end) - goal->lba);
        enum store_want want = store_want_map(dedup, goal->volume, goal->lba, count, STORE_LOOK);
        if (want == STORE_HAVE)
            map_values(dedup->datapath, goal->volume, goal->lba, count, goal->values);
        atoll_domain_commit(dedup->domain);
        if (want != STORE_HAVE)
            return want == STORE_LOST ? DEDUP_REASON_LOST : 0;
        for (uint32_t index = 0; index < count; index++)
            goal->fast[index] = MAP_KIND(goal->values[index]) == MAP_PBA &&
                                tier_readable(dedup->datapath, MAP_NUMBER(goal->values[index])) != TIER_NONE;
        goal->lba += count;
        goal->values += count;
        goal->fast += count;
    }
    return DEDUP_REASON_REACHED;
}

static int look_at_goal(struct dedup *dedup, struct goal *goal)
{
    struct datapath *dp = dedup->datapath;
    uint32_t status;
    if (goal->kind == DEDUP_GOAL_SERVE && (dp->damage_count != 0 || scrub_untold(dp)))
        return DEDUP_REASON_TELL;
    if (goal->kind == DEDUP_GOAL_SERVE)
        return atoll_domain_pending(dedup->domain, ATOLL_ROLE_KERNEL) != 0 ? ATOLL_REASON_CONTROL : 0;
    if (goal->kind == DEDUP_GOAL_LOAD) {
        enum store_state state = store_state(dedup);
        return state == STORE_NEW || state == STORE_LOADING ? 0 : DEDUP_REASON_REACHED;
    }
    if (goal->kind == DEDUP_GOAL_MAP)
        return look_at_map(dedup, goal);
    if (goal->phase == 0) {
        dp->posted_ends = goal->kind == DEDUP_GOAL_CLOSE;
        if (posted_failing(dp).count != 0 && goal->kind != DEDUP_GOAL_SYNC)
            return DEDUP_REASON_UNFLUSHED;
        if (posted_on_their_way(dp, goal->posted) || dp->posted_count != posted_failing(dp).count)
            return 0;
        dp->drain = goal->kind != DEDUP_GOAL_SYNC;
        if (dp->drain && destage_pending_order(dp) != UINT64_MAX)
            return 0;
        goal->ticket = store_sync(dedup);
        goal->failures = store_sync_failures(dedup, &status);
        goal->phase = 1;
        atoll_domain_commit(dedup->domain);
    }
    if (goal->phase == 1) {
        if (store_synced(dedup) < goal->ticket) {
            if (store_sync_failures(dedup, &status) != goal->failures)
                goal->phase = 0; /* again, until the deadline */
            return 0;
        }
        if (dp->arena->failed_records != 0 && goal->kind != DEDUP_GOAL_SYNC)
            return DEDUP_REASON_UNFLUSHED;
        if (goal->kind != DEDUP_GOAL_CLOSE)
            return DEDUP_REASON_REACHED;
        if (!tier_quiet(dp))
            return 0;
        store_close(dedup);
        atoll_domain_commit(dedup->domain);
        goal->phase = 2;
    }
    return store_closed(dedup) ? DEDUP_REASON_REACHED : 0;
}

static void at_ease(struct dedup *dedup)
{
    dedup->datapath->drain = false;
    dedup->datapath->tier.closing = false;
    dedup->datapath->posted_ends = false;
}

/* Who always has more to do lets those who wait for their turn on this processor go first, now and then: the clients' requests are
 * with them. */
static void offer(struct dedup *dedup)
{
    uint64_t now = atoll_now_ns();
    if (now - dedup->offered_ns < (dedup->datapath->alone ? OFFER_ALONE_NS : OFFER_NS))
        return;
    sched_yield();
    dedup->offered_ns = atoll_now_ns();
}

/* Nothing more to do. While posted writes come it dozes: nobody waits for them, and many at a time cost less. */
static void rest(struct dedup *dedup, uint32_t ignored, uint64_t wake_ms)
{
    struct datapath *dp = dedup->datapath;
    if (ignored == 0 && dp->now_ms - dp->posted_ms < DOZE_AFTER_MS)
        atoll_domain_doze(dedup->domain, 1u << ATOLL_ROLE_NIC, DOZE_NS);
    else
        atoll_domain_sleep(dedup->domain, ignored, wake_ms == 0 ? -1 : (int64_t)wake_ms * 1000000);
}

static int run(struct dedup *dedup, struct goal *goal, uint64_t deadline_ns)
{
    uint32_t kind = goal->kind;
    bool serve = kind != DEDUP_GOAL_LOAD;
    goal->posted = atoll_load_acquire(&dedup->datapath->nic_public->posted_order);
    /* Control messages wait while a control call is being answered; requests wait while the store is being loaded. */
    uint32_t ignored = kind == DEDUP_GOAL_SERVE ? 0 : 1u << ATOLL_ROLE_KERNEL;
    if (!serve)
        ignored |= 1u << ATOLL_ROLE_NBD | 1u << ATOLL_ROLE_NIC;
    for (;;) {
        uint64_t wake_ms = 0, now = 0;
        int reason = look_at_goal(dedup, goal);
        if (reason != 0) {
            at_ease(dedup);
            return reason;
        }
        bool more = turn(dedup, serve, &wake_ms);
        place_settle(&dedup->place, dedup->datapath->now_ms);
        if (more) {
            offer(dedup);
            continue;
        }
        if (kind != DEDUP_GOAL_SERVE && (wake_ms == 0 || wake_ms > 100))
            wake_ms = 100; /* messages are ignored: show that this is no hang */
        if (kind != DEDUP_GOAL_SERVE && (reason = look_at_goal(dedup, goal)) != 0) {
            at_ease(dedup);
            return reason;
        }
        if (deadline_ns != 0) {
            now = atoll_now_ns();
            if (now >= deadline_ns) {
                at_ease(dedup);
                return DEDUP_REASON_TIMEOUT;
            }
        }
        rest(dedup, ignored, wake_ms);
    }
}

void dedup_set_places(struct dedup *dedup, uint32_t cpu, const uint32_t *elsewhere, uint32_t count)
{
    if (dedup->place.where == 0)
        dedup->place.where = atoll_place_open(cpu, elsewhere, count);
}

int dedup_run(struct dedup *dedup, int kind, uint64_t deadline_ns)
{
    struct goal goal = {.kind = (uint32_t)kind};
    return run(dedup, &goal, deadline_ns);
}

int dedup_map(struct dedup *dedup, uint32_t volume, uint64_t first, uint32_t count, uint64_t *values, uint8_t *fast,
              uint64_t deadline_ns)
{
    struct goal goal = {.kind = DEDUP_GOAL_MAP, .volume = volume, .lba = first, .end = first + count, .values = values,
                        .fast = fast};
    return run(dedup, &goal, deadline_ns);
}

bool dedup_check_turn(struct dedup *dedup, bool sleep)
{
    dedup->domain->self->progress++;
    bool did = take_completions(dedup, ATOLL_ROLE_DISK);
    atoll_domain_commit(dedup->domain);
    log_committed(dedup->datapath);
    did |= store_step_quiet(dedup);
    dedup->datapath->retry = true;
    if (!did && sleep)
        atoll_domain_sleep(dedup->domain, ~(1u << ATOLL_ROLE_DISK), 5000000);
    return did;
}
