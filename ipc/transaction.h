/*
 * Transactions on a domain's own arena: how its state is consistent after each store (I5).
 *
 * Before a word is changed its old value goes into the journal; the change itself is made in place, so code reads
 * what it wrote. The commit point is one store: `count = 0`. A successor that finds count > 0 puts the old values
 * back, newest first, and is then in the state of the last commit, ready to repeat the step from its inputs.
 *
 * One step of a domain is one transaction: messages consumed (head_committed), state changed, messages produced
 * (tail_committed; both are settled by the commit, ring.h). What peers see, head and tail themselves, is published after the
 * commit, by the domain or, if it died in between, by its successor. So no message is lost, repeated or half
 * applied, and nothing needs to be sent again when a domain dies.
 *
 *   atoll_set64(journal, &word, value)   change a 64-bit word
 *   atoll_set32(journal, &word, value)   change a 32-bit word
 *   atoll_save(journal, pointer, bytes)  about to change a range (8-byte aligned, multiple of 8)
 *   atoll_commit(journal)                make everything since the last commit permanent
 *   atoll_roll_back(journal)             after a crash only
 *
 * Memory that nothing committed refers to yet (a fresh record, an unpublished descriptor) may be written directly.
 *
 * After a crash: a kill between journal entry and count leaves an entry that is not counted; between count and the
 * change, an entry that restores what is there already. Rolling back twice is harmless.
 */
#ifndef ATOLL_IPC_TRANSACTION_H
#define ATOLL_IPC_TRANSACTION_H

#include <assert.h>
#include <stdint.h>

#include "ipc/atomics.h"
#include "ipc/limits.h"

/* Tests compile with -DATOLL_STORE_HOOK and die in the hook after the N-th store. */
#ifdef ATOLL_STORE_HOOK
void atoll_store_hook(void);
#define ATOLL_STORED() atoll_store_hook()
#else
#define ATOLL_STORED() ((void)0)
#endif

struct atoll_journal_entry {
    uint64_t address; /* bit 0 set: a 32-bit word */
    uint64_t old_value;
};

struct atoll_journal {
    uint64_t count;
    uint64_t reserved[7];
    struct atoll_journal_entry entries[ATOLL_JOURNAL_ENTRIES];
};

static inline void atoll_journal_push(struct atoll_journal *journal, uint64_t address, uint64_t old_value)
{
    uint64_t index = journal->count;
    assert(index < ATOLL_JOURNAL_ENTRIES);
    journal->entries[index].address = address;
    ATOLL_STORED();
    journal->entries[index].old_value = old_value;
    ATOLL_STORED();
    atoll_compiler_barrier();
    *(volatile uint64_t *)&journal->count = index + 1;
    atoll_compiler_barrier();
    ATOLL_STORED();
}

static inline void atoll_set64(struct atoll_journal *journal, uint64_t *word, uint64_t value)
{
    atoll_journal_push(journal, (uint64_t)(uintptr_t)word, *word);
    *(volatile uint64_t *)word = value;
    ATOLL_STORED();
}

static inline void atoll_set32(struct atoll_journal *journal, uint32_t *word, uint32_t value)
{
    atoll_journal_push(journal, (uint64_t)(uintptr_t)word | 1, *word);
    *(volatile uint32_t *)word = value;
    ATOLL_STORED();
}

static inline void atoll_save(struct atoll_journal *journal, void *pointer, uint64_t bytes)
{
    uint64_t *words = pointer;
    assert(((uintptr_t)pointer & 7) == 0 && (bytes & 7) == 0);
    for (uint64_t index = 0; index < bytes / 8; index++)
        atoll_journal_push(journal, (uint64_t)(uintptr_t)(words + index), words[index]);
}

static inline void atoll_commit(struct atoll_journal *journal)
{
    atoll_compiler_barrier();
    *(volatile uint64_t *)&journal->count = 0; /* COMMIT POINT of every step of every domain */
    atoll_compiler_barrier();
    ATOLL_STORED();
}

static inline void atoll_roll_back(struct atoll_journal *journal)
{
    uint64_t count = journal->count;
    assert(count <= ATOLL_JOURNAL_ENTRIES);
    while (count > 0) {
        const struct atoll_journal_entry *entry = &journal->entries[count - 1];
        if (entry->address & 1)
            *(volatile uint32_t *)(uintptr_t)(entry->address & ~(uint64_t)1) = (uint32_t)entry->old_value;
        else
            *(volatile uint64_t *)(uintptr_t)entry->address = entry->old_value;
        atoll_compiler_barrier();
        ATOLL_STORED();
        *(volatile uint64_t *)&journal->count = --count;
        ATOLL_STORED();
    }
    atoll_compiler_barrier();
}

#endif
