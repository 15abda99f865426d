/*
 * The cache of metadata pages: frames, found by page through one hash.
 *
 *   store_get          a page, with the directories above it, from memory, from the device, or made
 *   store_cache_io     one has been read: checked, taken from the other copy if it is bad (I8), used
 *   store_set_flags    dirty, written, held
 *   store_cache_step   keeps some frames free: a clock lets clean pages go
 *
 * A frame whose page is in memory keeps that of its directory there, so pointers change in place. *Held* frames stay: dirty ones,
 * those written by the running checkpoint, those with words that exist in memory only, and directories above such.
 *
 * A frame is filled only if it was free at the last commit: what a rollback brings back is still there. So frames that are let
 * go can be used from the next commit on.
 *
 * After a crash: frames and what they hold are journaled; hash, clock and lists of free frames are made again (some hundred
 * microseconds). Reads in flight complete to the successor.
 */
#include <stdlib.h>

#include "ipc/crashpoint.h"
#include "services/dedup/store_internal.h"

#define FREE_KEPT 64         /* frames kept free, or an eighth */
#define EVICT_PER_STEP 64
#define CLOCK_PER_STEP 4096
#define EMPTY_PER_STEP 1024  /* frames looked at for empty pages of the map */
#define FRESH_VISITS 8       /* of the clock, that a page survives which nobody has come for yet */
#define URGENT_KEPT 3        /* last times that somebody urgent asked, whose pages stay */

/* --- Private indices ------------------------------------------------------------------------------------------------- */

static uint32_t bucket_of(const struct store *store, uint64_t page)
{
    return (uint32_t)(page * 0x9e3779b97f4a7c15u >> 32) & store->hash_mask;
}

static void hash_insert(struct store *store, uint32_t frame)
{
    uint32_t *head = &store->hash_heads[bucket_of(store, store->frames[frame].page)];
    store->hash_next[frame] = *head;
    *head = frame;
}

static void hash_remove(struct store *store, uint32_t frame)
{
    uint32_t *link = &store->hash_heads[bucket_of(store, store->frames[frame].page)];
    while (*link != frame) {
        assert(*link != STORE_NO_FRAME);
        link = &store->hash_next[*link];
    }
    *link = store->hash_next[frame];
}

static struct store_memo *memo_of(struct store *store, uint64_t page)
{
    return &store->memo[FORMAT_PAGE_TREE(page)][FORMAT_PAGE_NUMBER(page) % STORE_MEMO];
}

static uint32_t hash_find(const struct store *store, uint64_t page)
{
    uint32_t frame = store->hash_heads[bucket_of(store, page)];
    while (frame != STORE_NO_FRAME && store->frames[frame].page != page)
        frame = store->hash_next[frame];
    return frame;
}

static void *need(void *old, uint64_t count, uint64_t size)
{
    free(old);
    void *memory = calloc(count, size);
    if (memory == 0)
        abort(); /* some hundred KiB at the start of a process */
    return memory;
}

void store_cache_attach(struct store *store)
{
    uint32_t count = (uint32_t)store->area->geometry.frames, buckets = 1;
    while (buckets < 2 * count)
        buckets *= 2;
    store->hash_mask = buckets - 1;
    store->hash_heads = need(store->hash_heads, buckets, sizeof *store->hash_heads);
    store->hash_next = need(store->hash_next, count, sizeof *store->hash_next);
    store->free_frames = need(store->free_frames, count, sizeof *store->free_frames);
    store->freed_frames = need(store->freed_frames, count, sizeof *store->freed_frames);
    store->used = need(store->used, count, 1);
    store->fresh = need(store->fresh, count, 1);
    store->urgent_stamp = need(store->urgent_stamp, count, sizeof *store->urgent_stamp);
    store->stamp = URGENT_KEPT + 1;
    store->free_count = store->freed_count = 0;
    store->bounce_busy = 0;
    store->woken = true;
    store->empty_left = count; /* perhaps a predecessor was about to */
    memset(store->hash_heads, 0xff, buckets * sizeof *store->hash_heads);
    memset(store->memo, 0xff, sizeof store->memo);
    for (uint32_t frame = count; frame-- > 0;) {
        if (store->frames[frame].state == FRAME_FREE)
            store->free_frames[store->free_count++] = frame;
        else
            hash_insert(store, frame);
        if (store->frames[frame].state == FRAME_LOADING)
            store->bounce_busy |= (uint64_t)1 << store->frames[frame].bounce;
    }
}

uint32_t store_find(struct store *store, uint64_t page)
{
    struct store_memo *memo = memo_of(store, page);
    if (memo->page == page)
        return memo->frame;
    uint32_t frame = hash_find(store, page);
    if (frame == STORE_NO_FRAME || store->frames[frame].state != FRAME_VALID)
        return STORE_NO_FRAME;
    if (FORMAT_PAGE_LEVEL(page) == 0)
        *memo = (struct store_memo){.page = page, .frame = frame};
    return frame;
}

/* --- Held ------------------------------------------------------------------------------------------------------------ */

struct format_pointer *store_pointer(struct store *store, uint32_t frame)
{
    const struct store_frame *f = &store->frames[frame];
    if (f->parent == STORE_NO_FRAME)
        return &store->area->roots[FORMAT_PAGE_TREE(f->page)];
    return (struct format_pointer *)store_page_memory(store, f->parent) + FORMAT_PAGE_NUMBER(f->page) % FORMAT_POINTERS;
}

static void set32(struct store *store, uint32_t *word, uint32_t value) { atoll_set32(store->journal, word, value); }

/* Brings FRAME_HELD up to date, here and above. */
static void look_if_held(struct store *store, uint32_t frame)
{
    for (; frame != STORE_NO_FRAME; frame = store->frames[frame].parent) {
        struct store_frame *f = &store->frames[frame];
        bool held = (f->flags & (FRAME_DIRTY | FRAME_WRITING | FRAME_WRITTEN)) != 0 || f->live != 0 || f->held_children != 0;
        if (held == ((f->flags & FRAME_HELD) != 0))
            return;
        set32(store, &f->flags, f->flags ^ FRAME_HELD);
        STORE_ADD(store, frames_held, held ? 1 : -(uint64_t)1);
        if (f->parent == STORE_NO_FRAME)
            return;
        uint32_t *above = &store->frames[f->parent].held_children;
        set32(store, above, held ? *above + 1 : *above - 1);
    }
}

void store_set_flags(struct store *store, uint32_t frame, uint32_t set, uint32_t clear)
{
    struct store_frame *f = &store->frames[frame];
    uint32_t flags = (f->flags | set) & ~clear;
    if (flags == f->flags)
        return;
    if ((flags ^ f->flags) & FRAME_DIRTY)
        STORE_ADD(store, frames_dirty, flags & FRAME_DIRTY ? 1 : -(uint64_t)1);
    set32(store, &f->flags, flags);
    look_if_held(store, frame);
}

void store_mark_dirty(struct store *store, uint32_t frame) { store_set_flags(store, frame, FRAME_DIRTY, 0); }

void store_change_live(struct store *store, uint32_t frame, int32_t change)
{
    struct store_frame *f = &store->frames[frame];
    if (change == 0)
        return;
    bool was = f->live != 0;
    set32(store, &f->live, f->live + (uint32_t)change);
    if (was != (f->live != 0))
        look_if_held(store, frame);
}

uint64_t store_held_limit(const struct store *store)
{
    uint64_t frames = store->area->geometry.frames, spare = store->area->spare_slots;
    /* Tables are written too; a store that is as small as this has no more pages in all than it has spare slots. */
    if (spare > 1024)
        spare -= store->tables.slots;
    return (frames < spare ? frames : spare) / 2 - 24;
}

/* --- Getting pages --------------------------------------------------------------------------------------------------- */

static enum store_want lost(struct store *store, uint64_t page, uint32_t status)
{
    store->want_page = page;
    store->want_status = status;
    return STORE_LOST;
}

/* A free frame for `page`, entered. Everything but its state is as it should be. */
static uint32_t take_frame(struct store *store, uint64_t page, uint32_t parent)
{
    if (store->free_count == 0) {
        store->starved = true;
        store->starved_urgent |= store->urgent;
        return STORE_NO_FRAME;
    }
    uint32_t frame = store->free_frames[--store->free_count];
    struct store_frame *f = &store->frames[frame];
    assert(f->state == FRAME_FREE);
    atoll_save(store->journal, f, sizeof *f);
    *f = (struct store_frame){.page = page, .parent = parent};
    if (parent != STORE_NO_FRAME)
        set32(store, &store->frames[parent].children, store->frames[parent].children + 1);
    hash_insert(store, frame);
    store->used[frame] = 1;
    store->fresh[frame] = FRESH_VISITS;
    store->urgent_stamp[frame] = store->urgent ? store->stamp : 0;
    return frame;
}

/* Map pages that may exist; the others' places are kept for them. */
static uint64_t map_limit(const struct store *store)
{
    const struct store_area *area = store->area;
    uint64_t reserved = (area->slots / FORMAT_SLOTS_PER_PAGE + 1) * FORMAT_SLOTS_RESERVED;
    uint64_t kept = reserved + area->spare_slots + format_fixed_pages(area->device_blocks);
    return area->slots > kept ? area->slots - kept : 0;
}

uint64_t store_map_room(const struct dedup *dedup, uint64_t *most)
{
    const struct store *store = dedup->store;
    uint64_t used = store->area->map_pages + store->area->map_fresh;
    *most = map_limit(store);
    return used < *most ? *most - used : 0;
}

/* A page of zeros that is on no device yet. */
static enum store_want make(struct store *store, uint64_t page, uint32_t parent, struct format_pointer *pointer, uint32_t *frame)
{
    struct store_area *area = store->area;
    bool map = FORMAT_PAGE_TREE(page) == FORMAT_TREE_MAP;
    uint64_t most;
    if (map && area->state == STORE_READY && store_map_room(store->dedup, &most) == 0) {
        if (area->frames_dirty != 0)
            store_want_checkpoint(store); /* it gives empty pages back */
        return lost(store, page, ATOLL_ENOSPC);
    }
    uint32_t made = take_frame(store, page, parent);
    if (made == STORE_NO_FRAME)
        return STORE_WAIT;
    memset(store_page_memory(store, made), 0, ATOLL_BLOCK_BYTES);
    set32(store, &store->frames[made].state, FRAME_VALID);
    set32(store, &pointer->slot, STORE_SLOT_FRESH);
    if (map)
        STORE_ADD(store, map_fresh, 1);
    if (map && FORMAT_PAGE_LEVEL(page) == 0)
        store_count(store, STORE_COUNTER_LEAVES_MADE, 1);
    if (FORMAT_PAGE_TREE(page) == FORMAT_TREE_REFS && FORMAT_PAGE_LEVEL(page) == 0)
        store_refs_loaded(store, made);
    *frame = made;
    return STORE_HAVE;
}

static uint32_t now_ms(void) { return (uint32_t)(atoll_now_ns() / 1000000); }

uint64_t store_cache_io_address(const struct store *store, uint64_t number)
{
    const uint8_t *memory = store_bounce(store);
    if (memory == 0 || number >= store->area->geometry.frames || store->frames[number].state != FRAME_LOADING)
        return 0;
    return (uint64_t)(uintptr_t)(memory + (STORE_BATCH_READS + store->frames[number].bounce) * ATOLL_BLOCK_BYTES);
}

static bool submit_read(struct store *store, uint32_t frame)
{
    const uint8_t *memory = store_bounce(store);
    const struct store_frame *f = &store->frames[frame];
    uint64_t pba = store_slot_pba(store, store_pointer(store, frame)->slot, f->attempt);
    return memory != 0 && store_submit(store, STORE_IO_PAGE, frame, ATOLL_OP_IO_READ, pba,
                                       memory + (STORE_BATCH_READS + f->bounce) * ATOLL_BLOCK_BYTES, ATOLL_BLOCK_BYTES);
}

/* Of a frame whose read has ended: the page cannot be had for the time being. */
static void set_bad(struct store *store, uint32_t frame, uint32_t status)
{
    struct store_frame *f = &store->frames[frame];
    store->bounce_busy &= ~((uint64_t)1 << f->bounce);
    set32(store, &f->attempt, status);
    set32(store, &f->bounce, now_ms());
    set32(store, &f->state, FRAME_BAD);
}

static bool may_read(const struct store *store)
{
    return store->bounce_busy != ~(uint64_t)0 && store->dedup->io->free_count != 0;
}

/* Into a frame that is saved: all of it is changed directly. */
static void read_into(struct store *store, uint32_t frame)
{
    struct store_frame *f = &store->frames[frame];
    f->bounce = (uint32_t)__builtin_ctzll(~store->bounce_busy);
    store->bounce_busy |= (uint64_t)1 << f->bounce;
    f->attempt = 0;
    f->state = FRAME_LOADING;
    store->fresh[frame] = FRESH_VISITS;
    if (!submit_read(store, frame)) /* the driver's buffer area is too small to read anything */
        set_bad(store, frame, ATOLL_EIO);
}
_Static_assert(STORE_PAGE_READS == 64, "a bit each");

static enum store_want begin_read(struct store *store, uint64_t page, uint32_t parent, const struct format_pointer *pointer)
{
    if (store_slot_pba(store, pointer->slot, 0) == 0)
        return lost(store, page, ATOLL_ECORRUPT);
    uint32_t frame = may_read(store) ? take_frame(store, page, parent) : STORE_NO_FRAME; /* else for those that are being read */
    if (frame != STORE_NO_FRAME)
        read_into(store, frame);
    return STORE_WAIT;
}

/* Somebody asks for one that could not be read: perhaps the device has come to itself. */
static enum store_want read_again(struct store *store, uint32_t frame)
{
    struct store_frame *f = &store->frames[frame];
    if (now_ms() - f->bounce < STORE_RETRY_NS / 1000000 || !may_read(store))
        return lost(store, f->page, f->attempt);
    atoll_save(store->journal, f, sizeof *f);
    read_into(store, frame);
    return STORE_WAIT;
}

enum store_want store_get(struct store *store, uint64_t page, bool create, uint32_t *frame)
{
    uint32_t found = store_find(store, page), parent = STORE_NO_FRAME, state = FRAME_VALID;
    if (found == STORE_NO_FRAME) { /* perhaps it is there, but not to be used */
        found = hash_find(store, page);
        state = found == STORE_NO_FRAME ? FRAME_FREE : store->frames[found].state;
    }
    *frame = STORE_NO_FRAME;
    if (found != STORE_NO_FRAME) {
        store->used[found] = 1;
        if (store->urgent)
            store->urgent_stamp[found] = store->stamp;
        if (state == FRAME_LOADING)
            return STORE_WAIT;
        store->fresh[found] = 0;
        if (state == FRAME_BAD)
            return read_again(store, found);
        *frame = found;
        return STORE_HAVE;
    }
    uint32_t tree = FORMAT_PAGE_TREE(page), level = FORMAT_PAGE_LEVEL(page);
    struct format_pointer *pointer = &store->area->roots[tree];
    if (level != format_levels[tree]) {
        uint64_t number = FORMAT_PAGE_NUMBER(page);
        enum store_want want = store_get(store, FORMAT_PAGE(tree, level + 1, number / FORMAT_POINTERS), create, &parent);
        if (want != STORE_HAVE || parent == STORE_NO_FRAME)
            return want;
        pointer = (struct format_pointer *)store_page_memory(store, parent) + number % FORMAT_POINTERS;
    }
    assert(pointer->slot != STORE_SLOT_FRESH);
    if (pointer->slot != 0)
        return begin_read(store, page, parent, pointer);
    return create ? make(store, page, parent, pointer, frame) : STORE_HAVE;
}

/* Does an image that is what was written make sense? */
static bool sane(const struct store *store, uint64_t page, const void *image)
{
    uint32_t tree = FORMAT_PAGE_TREE(page);
    if (FORMAT_PAGE_LEVEL(page) != 0) {
        const struct format_pointer *pointer = image;
        for (uint32_t index = 0; index < FORMAT_POINTERS; index++)
            if (pointer[index].reserved != 0 || (pointer[index].slot != 0 && store_slot_pba(store, pointer[index].slot, 0) == 0))
                return false;
    } else if (tree == FORMAT_TREE_REFS) {
        const uint32_t *count = image;
        for (uint32_t index = 0; index < FORMAT_REFS_PER_PAGE; index++)
            if (count[index] > REF_COUNT_MAX)
                return false;
    } else if (tree == FORMAT_TREE_MAP) {
        const uint64_t *value = image;
        for (uint32_t index = 0; index < FORMAT_LEAF_ENTRIES; index++)
            if (value[index] != 0 && value[index] != MAP_VALUE(MAP_ZERO, 0) &&
                (MAP_KIND(value[index]) != MAP_PBA || !store_usable(store, MAP_NUMBER(value[index]))))
                return false;
    }
    return true;
}

void store_cache_io(struct store *store, uint64_t number, uint32_t status)
{
    if (number >= store->area->geometry.frames || store->frames[number].state != FRAME_LOADING)
        return; /* asked for by a predecessor that was loading */
    uint32_t frame = (uint32_t)number;
    struct store_frame *f = &store->frames[frame];
    const uint8_t *memory = store_bounce(store);
    const struct format_pointer *pointer = store_pointer(store, frame);
    uint8_t *page = store_page_memory(store, frame); /* nobody relies on it yet: written directly */
    ATOLL_CRASH_POINT(store->dedup->domain, "dedup.store.page.read");
    bool good = status == ATOLL_OK && memory != 0;
    if (good) {
        memcpy(page, memory + (STORE_BATCH_READS + f->bounce) * ATOLL_BLOCK_BYTES, ATOLL_BLOCK_BYTES);
        good = store_checksum(store, FORMAT_SEED_PAGE, f->page, page, ATOLL_BLOCK_BYTES) == pointer->checksum &&
               sane(store, f->page, page);
        status = ATOLL_ECORRUPT;
    }
    if (!good && f->attempt == 0) {
        set32(store, &f->attempt, 1);
        if (submit_read(store, frame))
            return;
    }
    store->woken = true;
    if (!good) {
        set_bad(store, frame, status);
        return;
    }
    store->bounce_busy &= ~((uint64_t)1 << f->bounce);
    bool repair = f->attempt == 1;
    set32(store, &f->state, FRAME_VALID);
    if (FORMAT_PAGE_TREE(f->page) == FORMAT_TREE_REFS && FORMAT_PAGE_LEVEL(f->page) == 0)
        store_refs_loaded(store, frame);
    if (repair) { /* written anew by the next checkpoint, which comes at once */
        store_mark_dirty(store, frame);
        store_count(store, STORE_COUNTER_PAGES_REPAIRED, 1);
        store_want_checkpoint(store);
    }
}

/* --- Letting them go ------------------------------------------------------------------------------------------------- */

void store_drop_frame(struct store *store, uint32_t frame)
{
    struct store_frame *f = &store->frames[frame];
    assert(!(f->flags & FRAME_HELD) && f->children == 0 && f->state != FRAME_LOADING && f->state != FRAME_FREE);
    struct format_pointer *pointer = store_pointer(store, frame);
    if (pointer->slot == STORE_SLOT_FRESH) { /* zeros that were never written: as if it had not been made */
        set32(store, &pointer->slot, 0);
        if (FORMAT_PAGE_TREE(f->page) == FORMAT_TREE_MAP)
            STORE_ADD(store, map_fresh, -1);
    }
    if (f->parent != STORE_NO_FRAME)
        set32(store, &store->frames[f->parent].children, store->frames[f->parent].children - 1);
    hash_remove(store, frame);
    struct store_memo *memo = memo_of(store, f->page);
    if (memo->page == f->page)
        memo->page = UINT64_MAX;
    set32(store, &f->state, FRAME_FREE);
    store->freed_frames[store->freed_count++] = frame;
}

void store_look_for_empty(struct store *store) { store->empty_left = (uint32_t)store->area->geometry.frames; }

/* Pages of the map that the checkpoint has found empty are on no device any more, but have a part of what the map may have. Where memory is not
 * short the clock would never come for them. */
static void drop_empty(struct store *store)
{
    for (uint32_t looked = 0; looked < EMPTY_PER_STEP && store->empty_left != 0 && store->freed_count < EVICT_PER_STEP; looked++) {
        uint32_t frame = --store->empty_left;
        while (frame != STORE_NO_FRAME) { /* and directories that lose their last page */
            const struct store_frame *f = &store->frames[frame];
            uint32_t above = f->parent;
            if (f->state != FRAME_VALID || (f->flags & FRAME_HELD) || f->children != 0 || FORMAT_PAGE_TREE(f->page) != FORMAT_TREE_MAP ||
                store_pointer(store, frame)->slot != STORE_SLOT_FRESH)
                break;
            store_drop_frame(store, frame);
            frame = above;
        }
    }
}

bool store_cache_step(struct store *store)
{
    uint32_t count = (uint32_t)store->area->geometry.frames, kept = count / 8 < FREE_KEPT ? count / 8 : FREE_KEPT;
    bool woken = store->woken;
    store->woken = false;
    if (store->freed_count != 0) {
        woken |= store->starved;
        store->starved = store->starved_urgent = false;
    }
    while (store->freed_count != 0)
        store->free_frames[store->free_count++] = store->freed_frames[--store->freed_count];
    if (store->empty_left != 0) {
        drop_empty(store);
        woken = true;
    }
    if (store->free_count >= kept)
        return woken;
    for (uint32_t looked = 0; looked < CLOCK_PER_STEP && store->free_count + store->freed_count < kept + EVICT_PER_STEP / 2; looked++) {
        uint32_t frame = store->clock_hand;
        const struct store_frame *f = &store->frames[frame];
        store->clock_hand = frame + 1 == count ? 0 : frame + 1;
        if ((f->state != FRAME_VALID && f->state != FRAME_BAD) || (f->flags & FRAME_HELD) || f->children != 0)
            continue;
        if (store->urgent_stamp[frame] + URGENT_KEPT >= store->stamp)
            continue;
        if (store->fresh[frame] != 0 && !store->starved_urgent) {
            store->fresh[frame]--;
            continue;
        }
        if (store->used[frame] && !store->starved_urgent) {
            store->used[frame] = 0;
            continue;
        }
        store_drop_frame(store, frame);
        if (store->freed_count >= EVICT_PER_STEP)
            break;
    }
    /* Nothing clean is left, and somebody waits. */
    if (store->freed_count == 0 && store->starved && store->area->state == STORE_READY)
        store_want_clean_pages(store, 1);
    if (store->starved_urgent)
        store->stamp++; /* those that were urgent before are it no more */
    return woken || store->freed_count != 0;
}
