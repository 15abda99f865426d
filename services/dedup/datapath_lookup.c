/*
 * The look-up table: what nbd may read without asking (ipc/layout.h, struct atoll_lookup), and who uses which page.
 *
 *   lookup_note        the block has this content once the step is committed
 *   lookup_prefetch    either of these is to come
 *   lookup_forget      its content changes, or is nobody's business any more
 *   lookup_committed   what was noted can be seen now
 *   lookup_retire      a page is about to be used for something else: nobody takes it from the table from now on
 *   lookup_uses        looks who has taken pages before that; lookup_in_use then tells
 *
 * A value is in the table only while the last commit says what it says. It is taken away when the step begins to change the
 * block, and put there when the step is committed, before or after others see what the step sent: nobody who was told of the
 * change finds the old value.
 *
 * A page may be used for something else if it was retired, then lookup_uses has looked, and lookup_in_use says no. So pages
 * that are let go wait for the end of the step (log_settle, cache_settle), where one look serves them all.
 *
 * After a crash: the table and the generations are as they are. Each value in it is true, since it was taken away before
 * the first change of the step that died; what was noted and not put there is missing.
 */
#include <stdlib.h>

#include "ipc/crashpoint.h"
#include "services/dedup/datapath.h"

/* Entries per page: values of pages that are gone stay until their place is needed. */
#define ENTRIES_PER_PAGE 2

static uint64_t sets_of(uint64_t page_count) { return (page_count * ENTRIES_PER_PAGE + ATOLL_LOOKUP_WAYS - 1) / ATOLL_LOOKUP_WAYS; }

uint64_t lookup_arena_bytes(uint64_t page_count)
{
    uint64_t bytes = sets_of(page_count) * ATOLL_LOOKUP_WAYS * sizeof(struct atoll_lookup_entry) + page_count * sizeof(uint32_t);
    return (bytes + ATOLL_PAGE_BYTES - 1) & ~(uint64_t)(ATOLL_PAGE_BYTES - 1);
}

bool lookup_attach(struct datapath *dp, void *memory)
{
    struct dp_lookup *lookup = &dp->lookup;
    struct atoll_lookup *public = &dp->dedup->public->lookup;
    uint64_t page_count = dp->record_count + dp->arena->cache_pages + dp->arena->tier_pages;
    lookup->entries = memory;
    lookup->set_count = sets_of(page_count);
    lookup->generations = (void *)(lookup->entries + lookup->set_count * ATOLL_LOOKUP_WAYS);
    lookup->page_count = page_count;
    lookup->in_use = calloc((page_count + 63) / 64, sizeof *lookup->in_use);
    lookup->marked = calloc(page_count, sizeof *lookup->marked);
    if (lookup->in_use == 0 || lookup->marked == 0)
        abort(); /* half a MiB at the start of a process */
    const struct atoll_nbd_public *nbd = atoll_nbd_public(dp->domain);
    if (nbd == 0) /* nobody would say what it uses, so nobody may look anything up */
        return dp->domain->peers[ATOLL_ROLE_NBD] == 0;
    lookup->uses[0] = &nbd->uses;
    lookup->uses[1] = &dp->nic_public->uses;
    /* The same each time, but after the death of all. */
    public->set_count = lookup->set_count;
    public->generations_address = (uint64_t)(uintptr_t)lookup->generations;
    public->page_count = page_count;
    public->first[0] = 0;
    public->first[1] = dp->arena->nic_pages;
    public->first[2] = dp->record_count;
    public->address[0] = dp->nic_buffer;
    public->address[1] = dp->merge_buffer;
    public->address[2] = dp->pools[POOL_DISK].buffer;
    public->first[3] = dp->record_count + dp->pools[POOL_TIER].first;
    public->address[3] = dp->pools[POOL_TIER].buffer;
    public->zeros_address = dp->zero_buffer;
    public->zeros_bytes = DP_ZERO_BYTES;
    atoll_store_release(&public->entries_address, (uint64_t)(uintptr_t)lookup->entries);
    return true;
}

void lookup_release(struct datapath *dp)
{
    free(dp->lookup.in_use);
    free(dp->lookup.marked);
}

void lookup_adopt(struct datapath *dp)
{
    for (uint64_t index = 0; index < dp->lookup.set_count * ATOLL_LOOKUP_WAYS; index++)
        atoll_store_relaxed(&dp->lookup.entries[index].value, 0);
    for (uint64_t page = 0; page < dp->lookup.page_count; page++)
        lookup_retire(dp, (uint32_t)page);
}

/* --- The table -------------------------------------------------------------------------------------------------------- */

static uint64_t key_of(const struct datapath *dp, uint32_t volume, uint64_t lba)
{
    return atoll_lookup_key(volume, dp->dedup->public->volumes[volume].generation, lba);
}

static struct atoll_lookup_entry *set_of(const struct datapath *dp, uint64_t key)
{
    return &dp->lookup.entries[atoll_lookup_set(key, dp->lookup.set_count) * ATOLL_LOOKUP_WAYS];
}

static struct atoll_lookup_entry *find(const struct datapath *dp, uint64_t key)
{
    struct atoll_lookup_entry *set = set_of(dp, key);
    for (uint32_t way = 0; way < ATOLL_LOOKUP_WAYS; way++)
        if (set[way].key == key)
            return &set[way];
    return 0;
}

void lookup_prefetch(const struct datapath *dp, uint32_t volume, uint64_t lba)
{
    __builtin_prefetch(set_of(dp, key_of(dp, volume, lba)), 1);
}

void lookup_forget(struct datapath *dp, uint32_t volume, uint64_t lba)
{
    uint64_t key = key_of(dp, volume, lba);
    struct atoll_lookup_entry *entry = key == 0 ? 0 : find(dp, key);
    if (entry != 0)
        atoll_store_relaxed(&entry->value, 0);
    atoll_compiler_barrier(); /* before the change: a successor must not find a value that is true no more */
}

/* True if the value leads to nothing. */
static bool is_stale(const struct datapath *dp, uint64_t value)
{
    return value == 0 || (atoll_lookup_kind(value) == ATOLL_LOOKUP_PAGE &&
                          dp->lookup.generations[atoll_lookup_page(value)] != atoll_lookup_generation(value));
}

/* The entry for `key`, made if need be: in a set without room one of them gives way, which one is chance enough. */
static struct atoll_lookup_entry *place_for(struct datapath *dp, uint64_t key)
{
    struct atoll_lookup_entry *set = set_of(dp, key), *entry = find(dp, key);
    if (entry != 0)
        return entry;
    for (uint32_t way = 0; entry == 0 && way < ATOLL_LOOKUP_WAYS; way++)
        if (is_stale(dp, set[way].value))
            entry = &set[way];
    if (entry == 0)
        entry = &set[dp->lookup.next_way++ % ATOLL_LOOKUP_WAYS];
    atoll_store_relaxed(&entry->value, 0); /* first: no reader finds another block's value under the new key */
    atoll_store_release(&entry->key, key);
    return entry;
}

static void note(struct datapath *dp, uint32_t volume, uint64_t lba, uint64_t value)
{
    struct dp_lookup *lookup = &dp->lookup;
    uint64_t key = lookup->uses[0] == 0 ? 0 : key_of(dp, volume, lba);
    if (key == 0)
        return;
    if (__builtin_expect(dp->posted_count != 0, 0) && posted_waits_for(dp, volume, lba)) {
        lookup_forget(dp, volume, lba); /* its client has been answered, and this is of a request that came before it */
        return;
    }
    struct atoll_lookup_entry *entry = place_for(dp, key);
    if (lookup->noted_count == DP_LOOKUP_NOTES) {
        atoll_store_relaxed(&entry->value, 0);
    } else {
        uint64_t number = lookup->noted_count++;
        /* A later change of the block in this step takes this mark away, and with it what is noted here. */
        atoll_store_relaxed(&entry->value, (uint64_t)ATOLL_LOOKUP_PENDING << 62 | number);
        lookup->noted[number].entry = entry;
        lookup->noted[number].key = key;
        lookup->noted[number].value = value;
    }
    atoll_compiler_barrier();
}

void lookup_note(struct datapath *dp, uint32_t volume, uint64_t lba, uint32_t page)
{
    note(dp, volume, lba, atoll_lookup_value(ATOLL_LOOKUP_PAGE, page, dp->lookup.generations[page]));
}

void lookup_note_hole(struct datapath *dp, uint32_t volume, uint64_t lba)
{
    note(dp, volume, lba, atoll_lookup_value(ATOLL_LOOKUP_HOLE, 0, 0));
}

void lookup_committed(struct datapath *dp)
{
    struct dp_lookup *lookup = &dp->lookup;
    if (lookup->noted_count == 0)
        return;
    ATOLL_CRASH_POINT(dp->domain, "dedup.lookup.put");
    for (uint32_t number = 0; number < lookup->noted_count; number++) {
        const struct dp_note *noted = &lookup->noted[number];
        if (noted->entry->key == noted->key && noted->entry->value == ((uint64_t)ATOLL_LOOKUP_PENDING << 62 | number))
            atoll_store_release(&noted->entry->value, noted->value);
    }
    lookup->noted_count = 0;
}

/* --- Pages ------------------------------------------------------------------------------------------------------------- */

void lookup_retire(struct datapath *dp, uint32_t page)
{
    atoll_store_relaxed(&dp->lookup.generations[page], dp->lookup.generations[page] + 1);
}

/* True if the use is in force. Its word is looked at first: what nbd changes later concerns pages that it must then find
 * retired. */
static bool in_force(const struct datapath *dp, uint32_t slot, uint64_t use)
{
    return use != 0 && atoll_use_in_force(use, atoll_load_acquire(&dp->nic_public->done[slot])); /* SP-DONE */
}

static void mark_uses(struct datapath *dp, const struct atoll_uses *uses)
{
    struct dp_lookup *lookup = &dp->lookup;
    for (uint32_t word = 0; word < ATOLL_SLOT_COUNT / 64; word++) {
        uint64_t bits = atoll_load_acquire(&uses->used[word]);
        for (; bits != 0; bits &= bits - 1) {
            uint32_t slot = word * 64 + (uint32_t)__builtin_ctzll(bits);
            uint64_t use = atoll_load_acquire(&uses->use[slot]);
            uint32_t count = atoll_use_count(use);
            if (!in_force(dp, slot, use))
                continue;
            for (uint32_t index = 0; index < count && index < ATOLL_USE_PAGES; index++) {
                uint32_t page = atoll_load_relaxed(&uses->pages[slot * ATOLL_USE_PAGES + index]);
                if (page >= lookup->page_count || lookup_in_use(dp, page))
                    continue;
                lookup->in_use[page / 64] |= (uint64_t)1 << page % 64;
                lookup->marked[lookup->marked_count++] = page;
            }
        }
    }
}

void lookup_uses(struct datapath *dp)
{
    struct dp_lookup *lookup = &dp->lookup;
    while (lookup->marked_count != 0) {
        uint32_t page = lookup->marked[--lookup->marked_count];
        lookup->in_use[page / 64] &= ~((uint64_t)1 << page % 64);
    }
    if (lookup->uses[0] == 0)
        return;
    atoll_full_fence(); /* SP-USE */
    for (uint32_t user = 0; user < DP_USERS; user++)
        mark_uses(dp, lookup->uses[user]);
}

bool lookup_was_touched(struct datapath *dp, uint32_t cache_page)
{
    struct dp_lookup *lookup = &dp->lookup;
    if (lookup->uses[0] == 0)
        return false;
    uint8_t touched = 0;
    for (uint32_t user = 0; user < DP_USERS; user++)
        touched += atoll_load_relaxed(&lookup->uses[user]->touched[cache_page % sizeof lookup->uses[user]->touched]);
    bool is = touched != dp->page_touched[cache_page];
    dp->page_touched[cache_page] = touched;
    return is;
}

bool lookup_find_use(const struct datapath *dp, uint32_t user, uint32_t *slot, uint32_t *index, uint32_t *page)
{
    const struct atoll_uses *uses = dp->lookup.uses[user];
    for (; uses != 0 && *slot < ATOLL_SLOT_COUNT; ++*slot, *index = 0) {
        uint64_t use = atoll_load_acquire(&uses->use[*slot]);
        uint32_t count = atoll_use_count(use) < ATOLL_USE_PAGES ? atoll_use_count(use) : ATOLL_USE_PAGES;
        if (*index >= count || !atoll_use_confirmed(use) || !in_force(dp, *slot, use))
            continue;
        *page = atoll_load_relaxed(&uses->pages[*slot * ATOLL_USE_PAGES + (*index)++]);
        if (atoll_load_acquire(&uses->use[*slot]) == use)
            return true;
    }
    return false;
}
