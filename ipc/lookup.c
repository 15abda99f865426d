/* See lookup.h. */
#include "ipc/lookup.h"

void atoll_lookup_attach(const struct atoll_domain *domain, struct atoll_looker *looker, struct atoll_uses *uses)
{
    const struct atoll_arena_header *dedup = domain->peers[ATOLL_ROLE_DEDUP];
    const struct atoll_dedup_public *published = atoll_dedup_public(domain);
    const struct atoll_nic_public *nic = atoll_nic_public(domain);
    uint64_t bytes = domain->peer_bytes[ATOLL_ROLE_DEDUP];

    looker->entries = 0;
    looker->uses = uses;
    looker->incarnation = dedup == 0 ? 0 : atoll_load_acquire(&dedup->incarnation);
    if (published == 0 || nic == 0)
        return;
    const struct atoll_lookup *public = &published->lookup;
    uint64_t entries = atoll_load_acquire(&public->entries_address);
    looker->table = *public;
    looker->table.entries_address = entries;
    const struct atoll_lookup *table = &looker->table;
    uint64_t set_bytes = ATOLL_LOOKUP_WAYS * sizeof(struct atoll_lookup_entry);
    if (entries == 0 || entries % sizeof(struct atoll_lookup_entry) != 0 || table->set_count == 0 ||
        table->set_count > bytes / set_bytes || table->page_count > bytes / sizeof(uint32_t) ||
        table->generations_address % sizeof(uint32_t) != 0 || table->zeros_bytes < ATOLL_BLOCK_BYTES ||
        !atoll_reference_in(domain, ATOLL_ROLE_DEDUP, entries, table->set_count * set_bytes) ||
        !atoll_reference_in(domain, ATOLL_ROLE_DEDUP, table->generations_address, table->page_count * sizeof(uint32_t)) ||
        !atoll_reference_in(domain, ATOLL_ROLE_DEDUP, table->zeros_address, table->zeros_bytes))
        return;
    looker->generations = (const uint32_t *)(uintptr_t)table->generations_address;
    looker->nic = nic;
    looker->entries = (const struct atoll_lookup_entry *)(uintptr_t)entries;
}

/* Where page `page` lies; 0: no such page. */
static uint64_t page_address(const struct atoll_looker *looker, uint32_t page)
{
    const struct atoll_lookup *table = &looker->table;
    uint32_t area = page >= table->first[3] ? 3 : page >= table->first[2] ? 2 : page >= table->first[1] ? 1 : 0;
    if (page >= table->page_count || page < table->first[area])
        return 0;
    return table->address[area] + (page - table->first[area]) * ATOLL_BLOCK_BYTES;
}

static uint64_t find(const struct atoll_looker *looker, uint64_t key)
{
    const struct atoll_lookup_entry *set = looker->entries + atoll_lookup_set(key, looker->table.set_count) * ATOLL_LOOKUP_WAYS;
    for (uint32_t way = 0; way < ATOLL_LOOKUP_WAYS; way++) {
        if (atoll_load_acquire(&set[way].key) != key)
            continue;
        /* The entry may become another block's, between key and value too, if this process loses the processor there. */
        uint64_t value = atoll_load_acquire(&set[way].value);
        bool same = atoll_load_acquire(&set[way].key) == key && atoll_load_relaxed(&set[way].value) == value;
        return same ? value : 0;
    }
    return 0;
}

static void publish(struct atoll_uses *uses, uint32_t slot, uint64_t use)
{
    uint64_t bit = (uint64_t)1 << slot % 64;
    if (!(uses->used[slot / 64] & bit))
        atoll_store_release(&uses->used[slot / 64], uses->used[slot / 64] | bit); /* before the use itself */
    atoll_store_release(&uses->use[slot], use);
}

bool atoll_lookup_take(const struct atoll_domain *domain, struct atoll_looker *looker, const struct atoll_read *read,
                       struct atoll_segment *data, uint32_t *count, struct atoll_taken *taken)
{
    struct atoll_uses *uses = looker->uses;
    uint32_t *pages = &uses->pages[read->slot * ATOLL_USE_PAGES];
    uint64_t first = atoll_read_first(read), blocks = atoll_read_blocks(read), end = read->offset + read->length;

    taken->pages = 0;
    if (looker->entries == 0 || blocks > ATOLL_PART_BLOCKS)
        return false;
    if (uses->use[read->slot] != 0) /* over; or of this very request, when a predecessor's step was rolled back */
        atoll_store_release(&uses->use[read->slot], 0);
    for (uint32_t index = 0; index < blocks; index++) {
        uint64_t key = atoll_lookup_key(read->volume, read->generation, first + index);
        uint64_t value = key == 0 ? 0 : find(looker, key);
        uint32_t start = index == 0 ? (uint32_t)(read->offset % ATOLL_BLOCK_BYTES) : 0;
        uint32_t stop = index + 1 == blocks ? (uint32_t)((end - 1) % ATOLL_BLOCK_BYTES + 1) : ATOLL_BLOCK_BYTES;
        uint64_t address = looker->table.zeros_address;
        uint32_t kind = ATOLL_SEGMENT_HOLE;
        if (atoll_lookup_kind(value) == ATOLL_LOOKUP_PAGE) {
            uint32_t page = atoll_lookup_page(value);
            address = page_address(looker, page);
            if (address == 0 || atoll_reference_role(domain, address, ATOLL_BLOCK_BYTES) == 0)
                return false;
            address += start;
            kind = ATOLL_SEGMENT_DATA;
            taken->generations[taken->pages] = atoll_lookup_generation(value);
            pages[taken->pages++] = page; /* of no use that is in force: the slot's last request is over */
        } else if (atoll_lookup_kind(value) != ATOLL_LOOKUP_HOLE) {
            return false;
        }
        data[index] = (struct atoll_segment){.address = address, .length = stop - start, .kind = kind};
    }
    *count = (uint32_t)blocks;
    if (taken->pages != 0)
        publish(uses, read->slot, atoll_use(read->sequence, false, taken->pages));
    return true;
}

bool atoll_lookup_confirm(struct atoll_looker *looker, const struct atoll_read *read, const struct atoll_taken *taken)
{
    struct atoll_uses *uses = looker->uses;
    const uint32_t *pages = &uses->pages[read->slot * ATOLL_USE_PAGES];
    if (taken->pages == 0)
        return true;
    atoll_full_fence(); /* SP-USE */
    for (uint32_t index = 0; index < taken->pages; index++) {
        if (atoll_load_acquire(&looker->generations[pages[index]]) != taken->generations[index]) {
            atoll_store_release(&uses->use[read->slot], 0);
            return false;
        }
    }
    atoll_store_release(&uses->use[read->slot], atoll_use(read->sequence, true, taken->pages));
    uint8_t mark = (uint8_t)(looker->hits++ >> 8);
    for (uint32_t index = 0; index < taken->pages; index++) {
        uint64_t page = pages[index] - looker->table.first[2];
        if (pages[index] >= looker->table.first[2] && uses->touched[page % sizeof uses->touched] != mark)
            uses->touched[page % sizeof uses->touched] = mark;
    }
    return true;
}

void atoll_lookup_tidy(struct atoll_looker *looker)
{
    struct atoll_uses *uses = looker->uses;
    if (looker->entries == 0)
        return;
    uint32_t word = looker->tidy_word++ % (ATOLL_SLOT_COUNT / 64);
    uint64_t bits = uses->used[word], kept = bits;
    for (; bits != 0; bits &= bits - 1) {
        uint32_t slot = word * 64 + (uint32_t)__builtin_ctzll(bits);
        if (!atoll_use_in_force(uses->use[slot], atoll_load_acquire(&looker->nic->done[slot])))
            kept &= ~((uint64_t)1 << slot % 64);
    }
    if (kept != uses->used[word])
        atoll_store_release(&uses->used[word], kept);
}
