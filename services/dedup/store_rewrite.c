/*
 * After a failed device flush: what was written since the last good one is written again (I7).
 *
 * An operating system may drop what it could not flush and call the next flush a success. So each block that was placed since the
 * last good sync is read back, checked against its fingerprint and written again, before the retried sync flushes and
 * writes the log. Which blocks these are says the metadata log's buffer: its BLOCK records from log_durable on. Log blocks
 * are written again anyway; pages of a running checkpoint become dirty again (store_checkpoint.c).
 *
 * A block that is not what it should be is lost; this sync fails with ATOLL_ECORRUPT, the next goes on, and whoever reads the block
 * is told by its fingerprint.
 *
 * A write may have completed before the failure and be placed long after it: while a block is in flight, its reference word holds
 * the number of failures so far, and if there were more when it is placed, the next sync writes again too.
 *
 * Pages of counts and fingerprints of these blocks are in memory: they are dirty, or were written by a checkpoint that needs this sync.
 *
 * After a crash: cursor, stage and list are in the arena, contents in the driver's buffer area; a successor goes on.
 */
#include "ipc/crashpoint.h"
#include "services/dedup/store_internal.h"

void store_rewrite_begin(struct store *store)
{
    STORE_SET(store, rewrite_sequence, store->area->log_durable);
    STORE_SET(store, rewrite_word, 0);
    STORE_SET(store, rewrite_count, 0);
    STORE_SET(store, rewrite_stage, 0);
    STORE_SET(store, rewrite_lost, 0);
}

/* Puts the next blocks on the list; false when there are no more. */
static bool collect(struct store *store)
{
    struct store_area *area = store->area;
    uint64_t sequence = area->rewrite_sequence, at = area->rewrite_word, count = 0;
    for (uint32_t looked = 0; sequence < area->sync_end && count < STORE_BATCH_READS && looked < 4096; looked++) {
        const uint8_t *block = store->log_buffer + sequence % STORE_LOG_BUFFER_BLOCKS * ATOLL_BLOCK_BYTES;
        const struct format_log_header *header = (const void *)block;
        const uint64_t *words = (const void *)(block + sizeof *header);
        if (at * 8 >= header->used_bytes) {
            sequence++;
            at = 0;
            continue;
        }
        uint64_t pba = FORMAT_RECORD_REST(words[at]);
        /* Freed meanwhile it still counts: what this sync makes durable may name it. It cannot have been handed out again. */
        const struct fingerprint *print = FORMAT_RECORD_TYPE(words[at]) == FORMAT_RECORD_BLOCK ? store_print(store, pba) : 0;
        if (print != 0 && store_keeps_content(store, pba) && print->low == words[at + 2] && print->high == words[at + 3])
            atoll_set64(store->journal, &area->rewrite_pba[count++], pba);
        at += store_record_words(words[at]);
    }
    STORE_SET(store, rewrite_sequence, sequence);
    STORE_SET(store, rewrite_word, at);
    STORE_SET(store, rewrite_count, count);
    return count != 0 || sequence < area->sync_end;
}

/* Sends the list's blocks from or to the bounce pages of their numbers, neighbours together. */
static void send(struct store *store, uint32_t opcode, const uint8_t *memory)
{
    struct store_area *area = store->area;
    for (uint64_t first = 0; first < area->rewrite_count;) {
        uint64_t count = 1;
        if (area->rewrite_pba[first] == 0) { /* lost */
            first++;
            continue;
        }
        while (first + count < area->rewrite_count && area->rewrite_pba[first + count] == area->rewrite_pba[first] + count)
            count++;
        bool sent = store_submit(store, STORE_IO_REWRITE, 0, opcode, area->rewrite_pba[first], memory + first * ATOLL_BLOCK_BYTES,
                                 count * ATOLL_BLOCK_BYTES);
        assert(sent); /* the caller looked at free_count */
        STORE_ADD(store, sync_outstanding, 1);
        first += count;
    }
}

bool store_rewrite_step(struct store *store)
{
    struct store_area *area = store->area;
    const uint8_t *memory = store_bounce(store);
    if (area->sync_outstanding != 0 || store->dedup->io->free_count < STORE_BATCH_READS || memory == 0)
        return false;
    ATOLL_CRASH_POINT(store->dedup->domain, "dedup.store.rewrite");
    switch (area->rewrite_stage) {
    case 0:
        if (!collect(store)) {
            STORE_SET(store, sync_phase, SYNC_FLUSH_DATA);
            if (area->rewrite_lost != 0)
                store_sync_fail(store, ATOLL_ECORRUPT);
            return true;
        }
        send(store, ATOLL_OP_IO_READ, memory);
        STORE_SET(store, rewrite_stage, area->rewrite_count != 0);
        return true;
    case 1:
        for (uint64_t index = 0; index < area->rewrite_count; index++) {
            uint8_t block[ATOLL_BLOCK_BYTES];
            uint64_t pba = area->rewrite_pba[index];
            memcpy(block, memory + index * ATOLL_BLOCK_BYTES, sizeof block);
            const struct fingerprint *print = store_print(store, pba);
            if (print != 0 && print_equal(store_print_of(block), *print))
                continue;
            STORE_ADD(store, rewrite_lost, 1);
            atoll_set64(store->journal, &area->rewrite_pba[index], 0);
        }
        send(store, ATOLL_OP_IO_WRITE, memory);
        STORE_SET(store, rewrite_stage, 2);
        return true;
    default: STORE_SET(store, rewrite_stage, 0); return true;
    }
}
