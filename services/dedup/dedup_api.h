/* What dedup's C offers to its Python: opening, the main loop, volumes, figures. */
#ifndef ATOLL_DEDUP_API_H
#define ATOLL_DEDUP_API_H

#include "ipc/domain.h"

/* cffi:begin */
struct dedup;

/* Sizes. Kept in the arena when it is made; an arena that is there keeps those it was made with. */
struct dedup_config {
    uint64_t nic_pages;
    uint64_t merge_pages;
    uint64_t cache_pages;       /* of the disk driver's buffers, all of them */
    uint64_t device_blocks;
    uint64_t metadata_frames;   /* metadata pages in memory, at least 128 */
    uint64_t grow;              /* 1: a store smaller than its device becomes as large when it is loaded */
    uint64_t fingerprint_slots; /* a power of two */
    uint64_t log_blocks;
    uint64_t destage_delay_ms;
    uint64_t tier_pages;        /* of the fast device's driver, all of them */
    uint64_t tier_places;       /* blocks on the fast device; 0: there is none */
    uint64_t track_blocks;      /* of the main device; at least ATOLL_THRESHOLD_MAX */
    uint64_t posted_blocks;     /* of posted writes on their way at once, at most ATOLL_POSTED_BLOCKS; 0: none is posted */
};

/* Until when dedup_run runs. */
enum dedup_goal {
    DEDUP_GOAL_SERVE = 0,   /* until a control message waits */
    DEDUP_GOAL_LOAD = 1,    /* until the store is loaded, blank or refused; serves nobody */
    DEDUP_GOAL_DRAIN = 2,   /* until all that is logged now and before is on stable storage */
    DEDUP_GOAL_CLOSE = 3,   /* and the store is closed cleanly */
    DEDUP_GOAL_SYNC = 4,    /* until all persistent changes made before are on stable storage */
    DEDUP_GOAL_MAP = 5      /* of dedup_map only */
};
enum dedup_reason {
    DEDUP_REASON_REACHED = 16,
    DEDUP_REASON_TIMEOUT = 17,
    DEDUP_REASON_UNFLUSHED = 18, /* an acknowledged write cannot be placed */
    DEDUP_REASON_LOST = 19,      /* a page of metadata cannot be read */
    DEDUP_REASON_TELL = 20       /* while serving: dedup_take_damage or dedup_scrub_untold has something for the kernel */
};

struct dedup_figures {
    uint64_t store_state;
    uint64_t device_blocks, metadata_blocks, stored_blocks, free_blocks, pending_free_blocks, reserved_blocks, references,
        zero_promises, quarantined_blocks, available_blocks, metadata_used_blocks;
    uint64_t metadata_cache_pages, metadata_cache_held, metadata_cache_dirty;
    uint64_t nic_pages, merge_pages, cache_pages;
    uint64_t log_records, failed_records, pinned_records, merge_free;
    uint64_t cache_valid, cache_loading, cache_pinned;
    uint64_t waiting, flushing, accepted, active_runs;
    uint64_t sync_failures;
    uint64_t tier_state, tier_places, tier_used, tier_queued, tier_copies, tier_pages, tier_in_flight, tier_table_blocks, tier_loaded;
};

/* The scrub: enum scrub_state of datapath.h, in the order of its phases. */
struct dedup_scrub {
    uint64_t number, state, rate_bytes_s, started_s, ended_s;
    uint64_t position, device_blocks; /* how far the phase is */
    uint64_t stored_blocks, verified_blocks, changed_blocks, damaged_count;
    uint64_t verified_pages, repaired_pages, lost_pages; /* of metadata */
};
struct dedup_damage {
    uint64_t pba, status, referrer_count;
    uint32_t volume[4]; /* of the first of them */
    uint64_t lba[4];
};

/* What volumes cost, in blocks. */
struct du_volume {
    uint64_t mapped;  /* entries that name a block */
    uint64_t logged;  /* of these, not written out yet */
    uint64_t alone;   /* distinct blocks */
    uint64_t shared;  /* of these, named by other volumes too */
};
struct du_state {
    uint64_t number, running, windows, windows_done, leaves, leaves_done, lost_leaves;
    struct du_volume volumes[256];
};

uint64_t dedup_role_bytes(const struct dedup_config *config);
uint64_t dedup_buffer_bytes(const struct dedup_config *config);
/* Attaches to the arena and recovers from what the predecessor left. NULL with a reason in `error` (256 bytes).
 * `crashed`: the predecessor ended by a signal of its own making (I8). */
struct dedup *dedup_open(struct atoll_domain *domain, const struct dedup_config *config, bool fresh, bool adopted,
                         bool crashed, bool quarantine, char *error);
/* `cpu`: the processor that the data path shares, to which this process is bound; `elsewhere`: those on which it may run at all. It
 * leaves the path's while that pays (place.c). */
void dedup_set_places(struct dedup *dedup, uint32_t cpu, const uint32_t *elsewhere, uint32_t count);
/* Runs until `goal` or until `deadline_ns` (atoll_now_ns; 0 none). Returns enum atoll_reason or dedup_reason. */
int dedup_run(struct dedup *dedup, int goal, uint64_t deadline_ns);
/* One turn of the loop without sleeping, for tests; true if there may be more to do. */
bool dedup_turn(struct dedup *dedup);
void dedup_format(struct dedup *dedup, uint64_t uuid_low, uint64_t uuid_high);
int dedup_store_state(struct dedup *dedup);
const char *dedup_store_reason(struct dedup *dedup);
void dedup_figures(struct dedup *dedup, struct dedup_figures *figures);
/* enum atoll_status; `reason` 256 bytes. In the running transaction; also notes `call` (dedup_last_call). */
int dedup_volume_create(struct dedup *dedup, const char *name, uint32_t name_bytes, uint64_t size_bytes, uint32_t flags,
                        uint32_t threshold, uint32_t tier_threshold, uint64_t call, char *reason);
int dedup_volume_set(struct dedup *dedup, uint32_t volume, uint32_t threshold, uint32_t tier_threshold, uint64_t call, char *reason);
int dedup_volume_resize(struct dedup *dedup, uint32_t volume, uint64_t size_bytes, uint64_t call, char *reason);
int dedup_volume_delete(struct dedup *dedup, uint32_t volume, uint64_t call, char *reason);
uint64_t dedup_last_call(struct dedup *dedup);
const struct atoll_volume *dedup_volume(struct dedup *dedup, uint32_t volume);
/* Connections that use the volume, by nbd's public table. */
uint32_t dedup_volume_users(struct dedup *dedup, uint32_t volume);
/* Map values (store.h) of the blocks [first, first + count) of a volume that exists, each as at some moment of the call; fast[i]: 1 if it is
 * read from the fast tier. Serves
 * meanwhile, as dedup_run does. Returns enum dedup_reason. */
int dedup_map(struct dedup *dedup, uint32_t volume, uint64_t first, uint32_t count, uint64_t *values, uint8_t *fast,
              uint64_t deadline_ns);
/* The oldest damage that was seen and not taken yet; false if there is none. `volume` is ATOLL_VOLUME_COUNT where nobody
 * waited for the block; `dropped`: so many more were not kept. */
struct dedup_seen { uint64_t pba, lba, dropped; uint32_t volume, status; };
bool dedup_take_damage(struct dedup *dedup, struct dedup_seen *seen);
/* True once for each scrub that has ended, in each process. */
bool dedup_scrub_untold(struct dedup *dedup);
void dedup_scrub_start(struct dedup *dedup, uint64_t rate_bytes_s);
void dedup_scrub_cancel(struct dedup *dedup);
void dedup_scrub(struct dedup *dedup, struct dedup_scrub *scrub);
/* Damaged block `index` of the last scrub; false if it is not kept. */
bool dedup_scrub_damage(struct dedup *dedup, uint32_t index, struct dedup_damage *damage);
int dedup_du_start(struct dedup *dedup, uint64_t *number);
void dedup_du(struct dedup *dedup, struct du_state *state);
/* Why the fast tier is away or refused; "" otherwise, 127 bytes at most. */
const char *dedup_tier_reason(struct dedup *dedup);
/* Places for a fast device of so many blocks, at most `most`. */
uint64_t dedup_tier_places(uint64_t device_blocks, uint64_t most);
/* Recounts and compares everything (between steps); lines of text, number of inconsistencies. DEDUP_CHECK_WAITS: to be called again,
 * with the same `text`, after dedup_check_turn. */
#define DEDUP_CHECK_WAITS 0xffffffff
uint32_t dedup_check(struct dedup *dedup, char *text, uint64_t bytes);
/* Completions, and pages that come and go; serves nobody. True if something was done; else it has slept a little, if it may. */
bool dedup_check_turn(struct dedup *dedup, bool sleep);
/* Forgets a check that waits. */
void dedup_check_cancel(struct dedup *dedup);
/* cffi:end */

#endif
