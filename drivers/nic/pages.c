/*
 * Who has which payload page.
 *
 * The arena's truth is struct nic_chunk: four masks of 16 pages. A page is free; or a slot's own while its part is received; or
 * lent to nbd with the part; or taken by dedup. "early": dedup gave it back before nbd's word that it was taken.
 *
 * Private: which free pages can be taken now (`available`; pages freed in this step are added after its commit), whole
 * chunks in one stack, split ones in a list. Large payloads take whole chunks, small ones pages of split chunks, so that
 * small ones do not fragment everything; when chunks run out, any free page serves.
 *
 * After a crash: `available` is the free mask of each chunk.
 */
#include "drivers/nic/nic.h"

#include <stdlib.h>

#define ALL 0xffffu
#define NONE UINT32_MAX

enum list { LIST_NO = 0, LIST_WHOLE, LIST_SPLIT };

struct place {
    uint16_t available;
    uint16_t freed;      /* in this step */
    uint32_t list;
    uint32_t next, previous;
};

struct nic_pages {
    uint32_t heads[3];
    uint64_t available_count;
    uint32_t freed_count;
    uint32_t *freed;     /* chunks with `freed` pages */
    struct place *places;
};

static void unlink_place(struct nic_pages *pages, uint32_t chunk)
{
    struct place *place = &pages->places[chunk];
    if (place->list == LIST_NO)
        return;
    if (place->previous != NONE)
        pages->places[place->previous].next = place->next;
    else
        pages->heads[place->list] = place->next;
    if (place->next != NONE)
        pages->places[place->next].previous = place->previous;
    place->list = LIST_NO;
}

static void relink(struct nic_pages *pages, uint32_t chunk)
{
    struct place *place = &pages->places[chunk];
    uint32_t list = place->available == ALL ? LIST_WHOLE : place->available != 0 ? LIST_SPLIT : LIST_NO;
    if (list == place->list)
        return;
    unlink_place(pages, chunk);
    if (list == LIST_NO)
        return;
    place->list = list;
    place->previous = NONE;
    place->next = pages->heads[list];
    if (place->next != NONE)
        pages->places[place->next].previous = chunk;
    pages->heads[list] = chunk;
}

struct nic_pages *nic_pages_make(struct nic *nic)
{
    struct nic_pages *pages = calloc(1, sizeof *pages);
    if (pages == 0)
        return 0;
    uint64_t count = nic->area->chunk_count;
    pages->places = calloc(count + 1, sizeof *pages->places);
    pages->freed = calloc(count + 1, sizeof *pages->freed);
    if (pages->places == 0 || pages->freed == 0) {
        nic_pages_free(pages);
        return 0;
    }
    pages->heads[LIST_WHOLE] = pages->heads[LIST_SPLIT] = NONE;
    for (uint64_t chunk = count; chunk-- > 0;) {
        struct place *place = &pages->places[chunk];
        place->available = (uint16_t)nic->chunks[chunk].masks;
        pages->available_count += (uint64_t)__builtin_popcount(place->available);
        relink(pages, (uint32_t)chunk);
    }
    return pages;
}

void nic_pages_free(struct nic_pages *pages)
{
    free(pages->places);
    free(pages->freed);
    free(pages);
}

uint64_t nic_pages_available(const struct nic *nic) { return nic->pages->available_count; }

/* --- Taking ------------------------------------------------------------------------------------------------------ */

static uint32_t add_run(struct nic *nic, struct atoll_segment *segments, uint32_t count, uint32_t chunk, uint32_t first, uint32_t length)
{
    uint64_t address = (uint64_t)(uintptr_t)nic->buffers + ((uint64_t)chunk * NIC_CHUNK_PAGES + first) * ATOLL_BLOCK_BYTES;
    if (count > 0 && segments[count - 1].address + segments[count - 1].length == address) {
        segments[count - 1].length += length * ATOLL_BLOCK_BYTES;
        return count;
    }
    segments[count] = (struct atoll_segment){.address = address, .length = length * ATOLL_BLOCK_BYTES};
    return count + 1;
}

/* Takes up to `wanted` available pages of the chunk. */
static uint32_t take_from(struct nic *nic, uint32_t chunk, uint32_t wanted, struct atoll_segment *segments, uint32_t *count)
{
    struct nic_pages *pages = nic->pages;
    struct place *place = &pages->places[chunk];
    uint32_t taken = 0, mask = 0;
    for (uint32_t page = 0; page < NIC_CHUNK_PAGES && taken < wanted;) {
        if (!(place->available >> page & 1)) {
            page++;
            continue;
        }
        uint32_t length = 0;
        while (page + length < NIC_CHUNK_PAGES && taken + length < wanted && (place->available >> (page + length) & 1))
            length++;
        *count = add_run(nic, segments, *count, chunk, page, length);
        mask |= ((1u << length) - 1) << page;
        taken += length;
        page += length;
    }
    place->available &= (uint16_t)~mask;
    pages->available_count -= taken;
    relink(pages, chunk);
    atoll_set64(nic->journal, &nic->chunks[chunk].masks, nic->chunks[chunk].masks & ~(uint64_t)mask);
    return taken;
}

uint32_t nic_pages_take(struct nic *nic, uint32_t wanted, bool contiguous, struct atoll_segment *segments)
{
    struct nic_pages *pages = nic->pages;
    uint32_t count = 0;
    if (wanted > pages->available_count || wanted == 0)
        return 0;
    if (contiguous && wanted > 1) {
        assert(wanted <= NIC_CHUNK_PAGES);
        if (pages->heads[LIST_WHOLE] == NONE)
            return 0;
        take_from(nic, pages->heads[LIST_WHOLE], wanted, segments, &count);
        return count;
    }
    while (wanted > 0) {
        uint32_t chunk = wanted >= NIC_CHUNK_PAGES ? pages->heads[LIST_WHOLE] : pages->heads[LIST_SPLIT];
        if (chunk == NONE)
            chunk = wanted >= NIC_CHUNK_PAGES ? pages->heads[LIST_SPLIT] : pages->heads[LIST_WHOLE];
        assert(chunk != NONE && count < NIC_PART_SEGMENTS);
        wanted -= take_from(nic, chunk, wanted, segments, &count);
    }
    return count;
}

/* --- Changing hands ---------------------------------------------------------------------------------------------- */

static void freed(struct nic *nic, uint32_t chunk, uint32_t mask)
{
    struct nic_pages *pages = nic->pages;
    struct place *place = &pages->places[chunk];
    if (place->freed == 0)
        pages->freed[pages->freed_count++] = chunk;
    place->freed |= (uint16_t)mask;
}

static void change_chunk(struct nic *nic, uint32_t chunk, uint64_t mask, enum nic_page_change change)
{
    uint64_t masks = nic->chunks[chunk].masks;
    uint64_t lent = masks >> 16 & mask, early = masks >> 48 & mask;
    uint64_t to_free = 0;
    assert((masks & mask) == 0 && (masks >> 32 & mask) == 0); /* neither free nor taken: a slot's own or lent */
    switch (change) {
    case NIC_PAGE_LEND:
        assert(lent == 0);
        masks |= mask << 16;
        break;
    case NIC_PAGE_FREE:
        if (early != 0)
            atoll_count(nic->domain, NIC_BAD_GIVE_BACK, 1); /* given back what was never taken */
        masks &= ~(mask << 16 | mask << 48);
        to_free = mask;
        break;
    case NIC_PAGE_TAKEN:
        assert(lent == mask);
        masks &= ~(mask << 16 | mask << 48);
        masks |= (mask & ~early) << 32;
        to_free = early;
        break;
    }
    masks |= to_free;
    atoll_set64(nic->journal, &nic->chunks[chunk].masks, masks);
    if (to_free != 0)
        freed(nic, chunk, (uint32_t)to_free);
}

void nic_pages_change(struct nic *nic, const struct nic_slot *slot, uint32_t part, enum nic_page_change change)
{
    if (nic_is_short_option(slot))
        return;
    const struct atoll_segment *segments = nic_segments(nic, slot, part);
    uint32_t count = slot->segments[part % NIC_PART_LISTS];
    for (uint32_t index = 0; index < count; index++) {
        uint64_t begin = (segments[index].address - (uint64_t)(uintptr_t)nic->buffers) / ATOLL_BLOCK_BYTES;
        uint64_t end = (segments[index].address + segments[index].length - 1 - (uint64_t)(uintptr_t)nic->buffers) / ATOLL_BLOCK_BYTES + 1;
        assert(segments[index].length > 0 && end <= nic->area->page_count);
        while (begin < end) {
            uint32_t first = begin % NIC_CHUNK_PAGES;
            uint32_t length = NIC_CHUNK_PAGES - first;
            if (length > end - begin)
                length = (uint32_t)(end - begin);
            change_chunk(nic, (uint32_t)(begin / NIC_CHUNK_PAGES), (uint64_t)((1u << length) - 1) << first, change);
            begin += length;
        }
    }
}

void nic_page_give_back(struct nic *nic, uint32_t page)
{
    uint32_t chunk = page / NIC_CHUNK_PAGES;
    uint64_t mask = 1u << page % NIC_CHUNK_PAGES;
    if (page >= nic->area->page_count) {
        atoll_count(nic->domain, NIC_BAD_GIVE_BACK, 1);
        return;
    }
    uint64_t masks = nic->chunks[chunk].masks;
    if (masks >> 32 & mask) {
        atoll_set64(nic->journal, &nic->chunks[chunk].masks, (masks & ~(mask << 32)) | mask);
        freed(nic, chunk, (uint32_t)mask);
    } else if ((masks >> 16 & mask) && !(masks >> 48 & mask)) {
        atoll_set64(nic->journal, &nic->chunks[chunk].masks, masks | mask << 48);
    } else {
        atoll_count(nic->domain, NIC_BAD_GIVE_BACK, 1);
    }
}

void nic_pages_committed(struct nic *nic)
{
    struct nic_pages *pages = nic->pages;
    for (uint32_t index = 0; index < pages->freed_count; index++) {
        struct place *place = &pages->places[pages->freed[index]];
        pages->available_count += (uint64_t)__builtin_popcount(place->freed & ~place->available);
        place->available |= place->freed;
        place->freed = 0;
        relink(pages, pages->freed[index]);
    }
    pages->freed_count = 0;
}

/* --- After the death of all -------------------------------------------------------------------------------------- */

void nic_pages_adopt(struct nic *nic, const uint8_t *held, uint64_t held_count)
{
    for (uint64_t chunk = 0; chunk < nic->area->chunk_count; chunk++) {
        uint64_t free_mask = 0, taken = 0;
        for (uint32_t bit = 0; bit < NIC_CHUNK_PAGES; bit++) {
            uint64_t page = chunk * NIC_CHUNK_PAGES + bit;
            if (page >= nic->area->page_count)
                break;
            if (page < held_count && held[page] == 1)
                taken |= (uint64_t)1 << bit;
            else
                free_mask |= (uint64_t)1 << bit;
        }
        nic->chunks[chunk].masks = free_mask | taken << 32;
    }
}

void nic_pages_keep(struct nic *nic, uint64_t address, uint64_t length)
{
    uint64_t base = (uint64_t)(uintptr_t)nic->buffers, first = (address - base) / ATOLL_BLOCK_BYTES;
    for (uint64_t page = first; page < first + length / ATOLL_BLOCK_BYTES && page < nic->area->page_count; page++) {
        uint64_t *masks = &nic->chunks[page / NIC_CHUNK_PAGES].masks, bit = (uint64_t)1 << page % NIC_CHUNK_PAGES;
        *masks = (*masks & ~bit) | bit << 32;
    }
}

void nic_pages_count(const struct nic *nic, struct nic_status *status)
{
    status->pages = nic->area->page_count;
    status->pages_free = status->pages_lent = status->pages_taken = 0;
    for (uint64_t chunk = 0; chunk < nic->area->chunk_count; chunk++) {
        uint64_t masks = nic->chunks[chunk].masks;
        status->pages_free += (uint64_t)__builtin_popcount((uint32_t)masks & ALL);
        status->pages_lent += (uint64_t)__builtin_popcount((uint32_t)(masks >> 16) & ALL);
        status->pages_taken += (uint64_t)__builtin_popcount((uint32_t)(masks >> 32) & ALL);
    }
}
