/*
 * The fast tier: copies of much-referenced blocks on a second device (the low-latency random-read memory, role llrrm).
 *
 *   tier_find            where a block's copy lies
 *   tier_consider        a block has got references: is it to be copied?
 *   tier_refused         a duplicate of it was too short a run to be shared: a reference that it would have
 *   tier_freed           its place on the main device is free, or about to be rewritten
 *   tier_read_failed     a read of a copy went wrong: it is dropped, the reader goes to the main device
 *   tier_step            queue, copies, table, the device's coming and going
 *
 * The tier is inclusive: the block on the main device stays allocated and counted, so the loss of the fast device loses
 * nothing. It is found by PBA: one table, PBA -> place, at the bottom of every read, so all index entries that refer to
 * a block follow it in the one transaction that enters it; the map is not touched.
 *
 * An entry:  FREE ──place taken, copy being written──► COPYING ──written──► VALID ──freed, evicted, wrong──► FREE
 *                                                         └──freed meanwhile──► LEAVING ──written──► FREE
 *
 * The least useful leave. A block enters with the credit 1 + ⌊log2 references⌋; each read of it adds as much again,
 * up to TIER_CREDIT_MAX. When a place is needed and none is free, the clock's hand takes 1 from each entry it passes; the
 * first without credit leaves. Where none of TIER_HAND_ENTRIES is without, the one with the least leaves, unless the
 * newcomer's credit is smaller still: then that one stays out.
 *
 * The device: NEW (superblock being read) -> FORMATTING or LOADING (its table, in the background) -> ONLINE; NEW again after an
 * error; AWAY after several, or silence, or without a superblock, tried again until it answers; REFUSED if it holds something that is not ours. Reads are served in LOADING and ONLINE,
 * copies made in ONLINE.
 *
 * After a crash: table, queue, copies and I/O lie in the arena; completions come to the successor. Only how many I/Os
 * are under way, and since when, is private, and made again. A silent device is noticed again.
 */
#ifndef ATOLL_DEDUP_DATAPATH_TIER_H
#define ATOLL_DEDUP_DATAPATH_TIER_H

#include "services/dedup/dedup.h"
#include "services/dedup/format_tier.h"

struct datapath;

#define TIER_NONE 0xffffffffu
/* Blocks that wait to be copied; what does not fit is considered again with its next reference or read. */
#define TIER_QUEUE 1024
/* Copies under way. */
#define TIER_COPIES 16
/* The last pages of llrrm's buffer area, which the tier reads its superblock and table into. */
#define TIER_BOUNCE_PAGES 8
/* Pages of dedup's buffer area from which the superblock and the table are written. */
#define TIER_STAGING_PAGES 4
/* I/O at the fast device under way: if it falls silent the rest of dedup's slots still serve the main device. */
#define TIER_IO_MOST 128
#define TIER_CREDIT_MAX 63
/* Counters of refused duplicates: a hint, so contents may meet in one, and nothing is lost with the process. */
#define TIER_DEMAND 65536
/* Entries at which the clock's hand looks for one place. */
#define TIER_HAND_ENTRIES 64
/* Nothing comes back for so long: readers go to the main device. A driver that is replaced takes some milliseconds. */
#define TIER_PATIENCE_NS 1000000000u
/* Errors in a row after which it is away: a single bad block is no reason, each further one costs a reader two reads. */
#define TIER_ERRORS_MOST 8
/* After this it is tried again; twice as long after each failure, up to the second. */
#define TIER_RETRY_FIRST_NS 250000000u
#define TIER_RETRY_LAST_NS 10000000000u
/* Changed pages of the table are written this often, so many at a time: what it lacks after a power loss is copied again. */
#define TIER_TABLE_NS 500000000u
#define TIER_TABLE_PAGES 32

enum tier_entry_state { TIER_FREE = 0, TIER_COPYING = 1, TIER_VALID = 2, TIER_LEAVING = 3 };
/* Numbered by hand (the arena outlives the process, and `status` shows it). */
enum tier_state {
    TIER_OFF = 0, TIER_NEW = 1, TIER_FORMATTING = 2, TIER_LOADING = 3, TIER_ONLINE = 4, TIER_AWAY = 5, TIER_REFUSED = 6
};
enum tier_copy_state { COPY_FREE = 0, COPY_READING = 1, COPY_WRITING = 2 };
/* What an I/O of kind IO_TIER is for: top byte of its argument; the rest is a number. */
enum tier_io {
    TIER_IO_SUPER_READ = 1, TIER_IO_SUPER_WRITE = 2, TIER_IO_TABLE_READ = 3, TIER_IO_TABLE_WRITE = 4, TIER_IO_COPY = 5, TIER_IO_END_READ = 6
};

struct tier_entry {
    uint64_t pba;
    struct fingerprint print;
    uint32_t next;           /* in its bucket */
    uint16_t state;          /* enum tier_entry_state */
    uint8_t credit;          /* not journaled: a hint */
    uint8_t weight;          /* 1 + log2 of its references when it came */
};
_Static_assert(sizeof(struct tier_entry) == 32, "half a cache line");

struct tier_copy {
    uint32_t state;          /* enum tier_copy_state */
    uint32_t page;           /* cache page that holds the block, pinned */
    uint64_t pba;
    uint64_t place;          /* WRITING */
};

struct tier_area {
    uint64_t places, table_blocks, buckets; /* sizes; 0 places: no tier */
    uint64_t state;          /* enum tier_state */
    uint64_t format_id;
    uint64_t opened;         /* 1: this device, as it is open now, has been ours: whatever it holds may be written over */
    uint64_t loaded;         /* table pages taken over; = table_blocks: all */
    uint64_t used;           /* entries that are not FREE */
    uint64_t hand;           /* of the clock */
    uint64_t free_cursor;    /* where to look for a free place */
    uint64_t table_cursor;   /* where to look for a changed table page */
    uint64_t pending;        /* a superblock or table read is under way: enum tier_io, 0 none */
    uint64_t staged[TIER_STAGING_PAGES]; /* table page being written from it + 1; 0 free */
    uint64_t queue_head, queue_tail;     /* counts; % TIER_QUEUE is the place */
    uint64_t queue[TIER_QUEUE];
    struct tier_copy copies[TIER_COPIES];
    char reason[128];        /* AWAY, REFUSED: why */
};

/* Private to the process. */
struct tier {
    struct tier_area *area;
    uint32_t *heads;         /* arena: buckets of entries by PBA */
    struct tier_entry *entries;
    uint64_t *taken;         /* arena: bit per place that is not FREE */
    uint64_t *dirty;         /* arena: bit per table page that differs from the device */
    uint64_t bounce, staging; /* addresses */
    uint64_t in_flight;      /* I/Os at llrrm */
    uint64_t heard_ns;       /* when one was answered last, or the first was sent */
    uint64_t errors, good;   /* answers in a row */
    uint64_t retry_ns, backoff_ns;
    uint64_t table_ns;       /* when the table is looked at next */
    uint64_t table_left;     /* pages of it that may still be written this time */
    uint64_t bounced;        /* table pages in the bounce pages that are not taken over yet */
    uint64_t bounce_first;   /* number of the first of them */
    enum { END_UNKNOWN, END_GOOD, END_BAD } end; /* NEW: the device's last block, read before its superblock */
    bool closing;            /* the table is to be written now */
    uint64_t recent[64];     /* PBAs queued lately: a block shared again and again is queued once */
    uint64_t refused;        /* duplicates */
    uint8_t demand[TIER_DEMAND]; /* of them, by fingerprint; halved from time to time */
};

uint64_t tier_arena_bytes(uint64_t places);
/* `memory`: zeroed if `fresh`. Without a fast device (no arena of llrrm, or `places` 0) the tier is OFF. */
void tier_attach(struct datapath *dp, void *memory, uint64_t places, bool fresh);
/* All processes died: no copy is under way, and perhaps it is another device. */
void tier_adopt(struct datapath *dp);

/* The entry of a PBA, or TIER_NONE; in whatever state. */
uint32_t tier_find(const struct datapath *dp, uint64_t pba);
/* The place of a copy that can be read now, or TIER_NONE. */
uint32_t tier_readable(const struct datapath *dp, uint64_t pba);
static inline uint64_t tier_block(const struct tier *tier, uint32_t place) { return 1 + tier->area->table_blocks + place; }
void tier_consider(struct datapath *dp, uint32_t volume, uint64_t pba);
void tier_refused(struct datapath *dp, uint32_t volume, uint64_t pba, struct fingerprint print);
void tier_served(struct datapath *dp, uint32_t place);
void tier_read_failed(struct datapath *dp, uint64_t pba, uint64_t block, uint32_t status);
void tier_drop(struct datapath *dp, uint64_t pba);
/* An I/O for the fast device; false: no slot, or too many under way. `kind`: IO_TIER, IO_FILL. */
bool tier_submit(struct datapath *dp, enum io_kind kind, uint64_t argument, uint32_t opcode, uint64_t block,
                 const struct atoll_segment *segments, uint32_t count);
uint64_t tier_room(const struct datapath *dp);
void tier_io_done(struct datapath *dp, const struct io_slot *slot, uint32_t status);
/* An I/O at llrrm has been answered, whatever for. `asked`: it was to see whether the device is still the same. */
void tier_answered(struct datapath *dp, uint32_t status, bool asked);
bool tier_step(struct datapath *dp, uint64_t *wake_ms);
/* True when the table on the device is as in memory, or the device does not answer. Asks for it. */
bool tier_quiet(struct datapath *dp);

/* Between the two files of the tier. */
void tier_dirty(struct datapath *dp, uint64_t place);
/* Enters a block found in the device's table; false if it makes no sense. */
bool tier_enter_loaded(struct datapath *dp, uint64_t place, const struct format_tier_entry *entry);
void tier_copy_done(struct datapath *dp, uint32_t number, uint32_t status);
bool tier_copies_step(struct datapath *dp);
/* The write of this copy will not be answered any more. */
void tier_forget_copy(struct datapath *dp, uint32_t place);
/* Takes one entry out whatever holds it, for a device that is formatted anew. True if there are more. */
bool tier_clear_some(struct datapath *dp);

#endif
