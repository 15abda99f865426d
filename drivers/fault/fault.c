/* See fault.h. */
#define _GNU_SOURCE
#include "drivers/fault/fault.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

/* Behind the driver's table in the role area. */
struct fault_table {
    uint64_t configured;      /* rules were set at least once */
    uint64_t random;          /* state of the generator, never 0 once configured */
    uint64_t record_bytes;    /* end of the record */
    uint64_t rule_count;
    struct fault_rule rules[FAULT_RULE_COUNT];
};

struct fault {
    struct atoll_domain *domain;
    struct disk *disk;
    struct fault_table *table; /* own arena */
    struct disk_hook hook;
    int record_fd;
    bool accesses;            /* record only where reads and writes go */
};

_Static_assert(sizeof(struct fault_rule) % 8 == 0 && sizeof(struct fault_record) == 40, "layout");

uint64_t fault_role_bytes(void) { return sizeof(struct disk_table) + sizeof(struct fault_table); }

/* --- Rules ------------------------------------------------------------------------------------------------------- */

static uint32_t kind_of(uint32_t opcode)
{
    switch (opcode) {
    case ATOLL_OP_IO_READ: return FAULT_READS;
    case ATOLL_OP_IO_WRITE: return FAULT_WRITES;
    case ATOLL_OP_IO_SYNC: return FAULT_SYNCS;
    default: return FAULT_DISCARDS;
    }
}

static bool touches(const struct fault_rule *rule, const struct disk_slot *slot)
{
    if (rule->length_bytes == 0 || slot->opcode == ATOLL_OP_IO_SYNC)
        return true;
    return slot->offset_bytes < rule->offset_bytes + rule->length_bytes &&
           rule->offset_bytes < slot->offset_bytes + slot->length_bytes;
}

/* xorshift64*: the same seed gives the same faults, over crashes too. */
static uint64_t next_random(struct fault *fault)
{
    uint64_t state = fault->table->random;
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    atoll_set64(fault->domain->journal, &fault->table->random, state);
    return state * 0x2545f4914f6cdd1du;
}

/* The slot is FREE still: its members are set directly. */
static void apply(const struct fault_rule *rule, struct disk_slot *slot)
{
    switch (rule->action) {
    case FAULT_ERROR:
        slot->fate_bytes = 0;
        slot->fate_error = (uint32_t)rule->argument;
        break;
    case FAULT_DELAY: slot->fate_due_ns = atoll_now_ns() + rule->argument; break;
    case FAULT_HANG: slot->fate_due_ns = UINT64_MAX; break;
    case FAULT_TEAR:
        slot->fate_bytes = rule->argument;
        slot->fate_error = rule->error;
        break;
    case FAULT_FORGET: slot->fate_bytes = 0; break;
    case FAULT_CRASH: abort();
    default: assert(!"fault_set checked the action");
    }
}

static void taken(void *context, struct disk *disk, struct disk_slot *slot)
{
    struct fault *fault = context;
    struct atoll_journal *journal = fault->domain->journal;
    (void)disk;
    for (uint64_t index = 0; index < fault->table->rule_count; index++) {
        struct fault_rule *rule = &fault->table->rules[index];
        if (!(rule->kinds & kind_of(slot->opcode)) || !touches(rule, slot))
            continue;
        atoll_set64(journal, &rule->matched, rule->matched + 1);
        if (rule->matched <= rule->skip || (rule->count != 0 && rule->applied >= rule->count))
            continue;
        if (rule->per_million < 1000000 && next_random(fault) % 1000000 >= rule->per_million)
            continue;
        atoll_set64(journal, &rule->applied, rule->applied + 1);
        apply(rule, slot);
        return;
    }
}

void fault_set(struct fault *fault, const struct fault_rule *rules, uint32_t count, uint64_t seed)
{
    struct atoll_journal *journal = fault->domain->journal;
    assert(count <= FAULT_RULE_COUNT);
    atoll_save(journal, fault->table->rules, count * sizeof rules[0]);
    for (uint32_t index = 0; index < count; index++) {
        assert(rules[index].action >= FAULT_ERROR && rules[index].action <= FAULT_CRASH);
        fault->table->rules[index] = rules[index];
    }
    atoll_set64(journal, &fault->table->rule_count, count);
    if (seed != 0 || fault->table->random == 0)
        atoll_set64(journal, &fault->table->random, seed * 0x9e3779b97f4a7c15u | 1);
    atoll_set64(journal, &fault->table->configured, 1);
}

uint32_t fault_rules(struct fault *fault, struct fault_rule *rules)
{
    memcpy(rules, fault->table->rules, fault->table->rule_count * sizeof rules[0]);
    return (uint32_t)fault->table->rule_count;
}

uint32_t fault_release(struct fault *fault)
{
    uint32_t count = 0;
    for (uint32_t number = 0; number < ATOLL_IO_COUNT; number++) {
        struct disk_slot *slot = &fault->disk->table->slots[number];
        if (slot->state != DISK_QUEUED || slot->fate_due_ns == 0)
            continue;
        atoll_set64(fault->domain->journal, &slot->fate_due_ns, 0);
        count++;
    }
    return count;
}

/* --- The recorder ------------------------------------------------------------------------------------------------ */

/* Writes `count` pieces at the record's end and moves it in the running transaction. A recorder that fails makes every
 * later test worthless, so the driver does not go on without it. */
static void record(struct fault *fault, const struct iovec *pieces, uint32_t count)
{
    uint64_t end = fault->table->record_bytes;
    for (uint32_t index = 0; index < count; index++) {
        const char *from = pieces[index].iov_base;
        uint64_t left = pieces[index].iov_len;
        while (left != 0) {
            ssize_t written = pwrite(fault->record_fd, from, left, (off_t)end);
            if (written < 0 && errno == EINTR)
                continue;
            if (written <= 0) {
                fprintf(stderr, "fault: the record cannot be written: %s\n", strerror(errno));
                abort();
            }
            from += written;
            left -= (uint64_t)written;
            end += (uint64_t)written;
        }
    }
    atoll_set64(fault->domain->journal, &fault->table->record_bytes, end);
}

static void starting(void *context, struct disk *disk, struct disk_slot *slot)
{
    struct fault *fault = context;
    struct iovec pieces[ATOLL_IO_BLOCKS + 1];
    struct fault_record head = {.magic = FAULT_RECORD_MAGIC,
                                .identity = slot->identity,
                                .offset_bytes = slot->offset_bytes + slot->done_bytes,
                                .opcode = slot->opcode};
    uint32_t count = 1;
    bool moves = slot->opcode == ATOLL_OP_IO_READ || slot->opcode == ATOLL_OP_IO_WRITE;
    (void)disk;
    if (fault->record_fd < 0 || (fault->accesses ? !moves : slot->opcode == ATOLL_OP_IO_READ))
        return;
    if (fault->accesses) {
        head.kind = FAULT_RECORD_ACCESS;
        head.length_bytes = slot->length_bytes - slot->done_bytes;
    } else if (slot->opcode == ATOLL_OP_IO_WRITE) {
        head.kind = FAULT_RECORD_WRITE;
        for (uint32_t index = slot->iovec_first; index < slot->iovec_count; index++) {
            pieces[count++] = slot->iovecs[index];
            head.length_bytes += slot->iovecs[index].iov_len;
        }
    } else {
        head.kind = slot->opcode == ATOLL_OP_IO_SYNC ? FAULT_RECORD_SYNC : FAULT_RECORD_DISCARD;
        head.length_bytes = slot->length_bytes;
    }
    pieces[0] = (struct iovec){.iov_base = &head, .iov_len = sizeof head};
    record(fault, pieces, count);
    atoll_commit(fault->domain->journal); /* a transaction of its own, between those of the loop */
}

static void finished(void *context, struct disk *disk, struct disk_slot *slot, uint32_t status)
{
    struct fault *fault = context;
    struct fault_record head = {.magic = FAULT_RECORD_MAGIC,
                                .kind = FAULT_RECORD_DONE,
                                .identity = slot->identity,
                                .offset_bytes = slot->offset_bytes,
                                .length_bytes = 0,
                                .status = status,
                                .opcode = slot->opcode};
    struct iovec piece = {.iov_base = &head, .iov_len = sizeof head};
    (void)disk;
    if (fault->record_fd >= 0 && !fault->accesses && slot->opcode != ATOLL_OP_IO_READ)
        record(fault, &piece, 1);
}

uint64_t fault_record_bytes(struct fault *fault) { return fault->table->record_bytes; }

/* --- Attaching --------------------------------------------------------------------------------------------------- */

struct fault *fault_attach(struct atoll_domain *domain, struct disk *disk, int record_fd, bool accesses, char *error)
{
    struct fault *fault = calloc(1, sizeof *fault);
    if (fault == 0 || domain->self->role_bytes < fault_role_bytes()) {
        snprintf(error, 256, "role area of %llu bytes, driver and rules need %llu",
                 (unsigned long long)domain->self->role_bytes, (unsigned long long)fault_role_bytes());
        free(fault);
        return 0;
    }
    fault->domain = domain;
    fault->disk = disk;
    fault->table = (void *)(disk->table + 1);
    fault->record_fd = record_fd;
    fault->accesses = accesses;
    fault->hook = (struct disk_hook){.context = fault, .taken = taken, .starting = starting, .finished = finished};
    disk->hook = &fault->hook;
    return fault;
}

void fault_detach(struct fault *fault)
{
    fault->disk->hook = 0;
    free(fault);
}

bool fault_is_fresh(struct fault *fault) { return fault->table->configured == 0; }
