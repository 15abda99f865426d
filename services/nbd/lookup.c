/*
 * Reads that nbd answers by itself: blocks that dedup's look-up table names lie in memory and are sent from there.
 *
 *   nbd_lookup_attach    finds the table; there may be none
 *   nbd_lookup           the data of a READ of one part, or false: ask dedup
 *   nbd_lookup_tidy      forgets uses that are over
 *
 * Look up, publish the use, look again (ipc/layout.h, SP-USE). The read happens at the moment of the first look: what the table
 * says then is the last commit's, and a change is told to its client only after it has left the table. Between the looks
 * a page may be given to something else; then its generation has changed, and dedup is asked. After the second look
 * dedup sees the use, until nic is done with the slot.
 *
 * After a crash: uses stay published. Of a step that was rolled back they hold pages until nic is done with the slot's request,
 * which is executed again.
 */
#include "services/nbd/transmission.h"

void nbd_lookup_attach(struct nbd *nbd)
{
    struct nbd_lookup *lookup = &nbd->lookup;
    const struct atoll_domain *domain = nbd->domain;
    const struct atoll_arena_header *dedup = domain->peers[ATOLL_ROLE_DEDUP];
    const struct atoll_dedup_public *published = atoll_dedup_public(domain);
    const struct atoll_nic_public *nic = atoll_nic_public(domain);
    uint64_t bytes = domain->peer_bytes[ATOLL_ROLE_DEDUP];

    lookup->entries = 0;
    lookup->incarnation = dedup == 0 ? 0 : atoll_load_acquire(&dedup->incarnation);
    if (published == 0 || nic == 0)
        return;
    const struct atoll_lookup *public = &published->lookup;
    uint64_t entries = atoll_load_acquire(&public->entries_address);
    lookup->table = *public;
    lookup->table.entries_address = entries;
    const struct atoll_lookup *table = &lookup->table;
    uint64_t set_bytes = ATOLL_LOOKUP_WAYS * sizeof(struct atoll_lookup_entry);
    if (entries == 0 || entries % sizeof(struct atoll_lookup_entry) != 0 || table->set_count == 0 ||
        table->set_count > bytes / set_bytes || table->page_count > bytes / sizeof(uint32_t) ||
        table->generations_address % sizeof(uint32_t) != 0 || table->zeros_bytes < ATOLL_BLOCK_BYTES ||
        !atoll_reference_in(domain, ATOLL_ROLE_DEDUP, entries, table->set_count * set_bytes) ||
        !atoll_reference_in(domain, ATOLL_ROLE_DEDUP, table->generations_address, table->page_count * sizeof(uint32_t)) ||
        !atoll_reference_in(domain, ATOLL_ROLE_DEDUP, table->zeros_address, table->zeros_bytes))
        return;
    lookup->generations = (const uint32_t *)(uintptr_t)table->generations_address;
    lookup->done = nic->done;
    lookup->entries = (const struct atoll_lookup_entry *)(uintptr_t)entries;
}

/* Where page `page` lies; 0: no such page. */
static uint64_t page_address(const struct nbd_lookup *lookup, uint32_t page)
{
    const struct atoll_lookup *table = &lookup->table;
    uint32_t area = page >= table->first[3] ? 3 : page >= table->first[2] ? 2 : page >= table->first[1] ? 1 : 0;
    if (page >= table->page_count || page < table->first[area])
        return 0;
    return table->address[area] + (page - table->first[area]) * ATOLL_BLOCK_BYTES;
}

static uint64_t find(const struct nbd_lookup *lookup, uint64_t key)
{
    const struct atoll_lookup_entry *set = lookup->entries + atoll_lookup_set(key, lookup->table.set_count) * ATOLL_LOOKUP_WAYS;
    for (uint32_t way = 0; way < ATOLL_LOOKUP_WAYS; way++)
        if (atoll_load_acquire(&set[way].key) == key)
            return atoll_load_acquire(&set[way].value);
    return 0;
}

static void publish(struct nbd *nbd, uint32_t number, uint64_t use)
{
    struct atoll_nbd_public *public = &nbd->area->public;
    uint64_t bit = (uint64_t)1 << number % 64;
    if (!(public->used[number / 64] & bit))
        atoll_store_release(&public->used[number / 64], public->used[number / 64] | bit); /* before the use itself */
    atoll_store_release(&public->use[number], use);
}

bool nbd_lookup(struct nbd *nbd, const struct nbd_slot *slot, struct atoll_segment *data, uint32_t *count)
{
    struct nbd_lookup *lookup = &nbd->lookup;
    struct atoll_nbd_public *public = &nbd->area->public;
    uint32_t number = atoll_identity_slot(slot->identity), sequence = atoll_identity_sequence(slot->identity);
    uint32_t *pages = &public->pages[number * ATOLL_USE_PAGES], page_count = 0, generations[ATOLL_PART_BLOCKS];
    uint64_t first = slot->offset / ATOLL_BLOCK_BYTES, end = slot->offset + slot->length;
    uint64_t blocks = (end - 1) / ATOLL_BLOCK_BYTES - first + 1;

    if (lookup->entries == 0 || blocks > ATOLL_PART_BLOCKS || atoll_trace_armed(nbd->domain)) /* a trace shows the long way */
        return false;
    if (nbd_posted_covers(nbd, slot->volume, first, blocks))
        return false;
    if (public->use[number] != 0) /* over; or of this very request, when a predecessor's step was rolled back */
        atoll_store_release(&public->use[number], 0);
    for (uint32_t index = 0; index < blocks; index++) {
        uint64_t key = atoll_lookup_key(slot->volume, slot->generation, first + index);
        uint64_t value = key == 0 ? 0 : find(lookup, key);
        uint32_t start = index == 0 ? (uint32_t)(slot->offset % ATOLL_BLOCK_BYTES) : 0;
        uint32_t stop = index + 1 == blocks ? (uint32_t)((end - 1) % ATOLL_BLOCK_BYTES + 1) : ATOLL_BLOCK_BYTES;
        uint64_t address = lookup->table.zeros_address;
        uint32_t kind = ATOLL_SEGMENT_HOLE;
        if (atoll_lookup_kind(value) == ATOLL_LOOKUP_PAGE) {
            uint32_t page = atoll_lookup_page(value);
            address = page_address(lookup, page);
            if (address == 0 || atoll_reference_role(nbd->domain, address, ATOLL_BLOCK_BYTES) == 0)
                return false;
            address += start;
            kind = ATOLL_SEGMENT_DATA;
            generations[page_count] = atoll_lookup_generation(value);
            pages[page_count++] = page; /* of no use that is in force: the slot's last request is over */
        } else if (atoll_lookup_kind(value) != ATOLL_LOOKUP_HOLE) {
            return false;
        }
        data[index] = (struct atoll_segment){.address = address, .length = stop - start, .kind = kind};
    }
    *count = (uint32_t)blocks;
    if (page_count == 0)
        return true;

    publish(nbd, number, atoll_use(sequence, false, page_count));
    ATOLL_CRASH_POINT(nbd->domain, "nbd.use.published");
    atoll_full_fence(); /* SP-USE */
    for (uint32_t index = 0; index < page_count; index++) {
        if (atoll_load_acquire(&lookup->generations[pages[index]]) != generations[index]) {
            atoll_store_release(&public->use[number], 0);
            return false;
        }
    }
    atoll_store_release(&public->use[number], atoll_use(sequence, true, page_count));
    uint8_t mark = (uint8_t)(lookup->hits++ >> 8);
    for (uint32_t index = 0; index < page_count; index++) {
        uint64_t page = pages[index] - lookup->table.first[2];
        if (pages[index] >= lookup->table.first[2] && public->touched[page % sizeof public->touched] != mark)
            public->touched[page % sizeof public->touched] = mark;
    }
    return true;
}

void nbd_lookup_tidy(struct nbd *nbd)
{
    struct nbd_lookup *lookup = &nbd->lookup;
    struct atoll_nbd_public *public = &nbd->area->public;
    if (lookup->entries == 0)
        return;
    uint32_t word = lookup->tidy_word++ % (ATOLL_SLOT_COUNT / 64);
    uint64_t bits = public->used[word], kept = bits;
    for (; bits != 0; bits &= bits - 1) {
        uint32_t number = word * 64 + (uint32_t)__builtin_ctzll(bits);
        uint64_t use = public->use[number];
        if (use == 0 || (int32_t)(atoll_load_acquire(&lookup->done[number]) - atoll_use_sequence(use)) >= 0)
            kept &= ~((uint64_t)1 << number % 64);
    }
    if (kept != public->used[word])
        atoll_store_release(&public->used[word], kept);
}
