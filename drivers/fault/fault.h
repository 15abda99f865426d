/*
 * Faults by rule, in front of the storage driver's own code (drivers/disk): what a request meets is decided when it is
 * taken, in the same transaction, and lies in the arena.
 *
 *   fault_attach(disk, ...)        puts the rules' table behind the driver's in the role area
 *   fault_set(fault, rules, n)     replaces the rules; in the running transaction
 *   fault_release(fault)           lets go of everything that hangs or is delayed; in the running transaction
 *   fault_rule / fault_record_bytes   for the status
 *
 * The recorder writes down what reaches the device, in the order of its start, into a file:
 *
 *   40 bytes struct fault_record, little-endian; after FAULT_RECORD_WRITE `length_bytes` of data
 *
 * If only accesses are recorded, FAULT_RECORD_ACCESS alone, for reads and writes, without data.
 *
 * After a crash: rules, their counts, the random numbers' state and the end of the record are part of the driver's
 * transactions. A record beyond that end is written again. An I/O that is done again is recorded again.
 */
#ifndef ATOLL_FAULT_H
#define ATOLL_FAULT_H

#include "drivers/disk/disk.h"

/* cffi:begin */
#define FAULT_RULE_COUNT 32
#define FAULT_RECORD_MAGIC 0x64726346

/* States reach a successor: never renumber. */
enum fault_action {
    FAULT_ERROR = 1,    /* fails with errno `argument`; nothing is done */
    FAULT_DELAY = 2,    /* done after `argument` ns */
    FAULT_HANG = 3,     /* not done before fault_release */
    FAULT_TEAR = 4,     /* only the first `argument` bytes are done; reported as success, or as errno `error` */
    FAULT_FORGET = 5,   /* nothing is done; reported as success */
    FAULT_CRASH = 6     /* the driver aborts while it takes the request; so uncounted, it meets the request again */
};

enum fault_kind { FAULT_READS = 1, FAULT_WRITES = 2, FAULT_SYNCS = 4, FAULT_DISCARDS = 8 };

/* The first rule that applies to a request decides. */
struct fault_rule {
    uint32_t action;         /* enum fault_action */
    uint32_t kinds;          /* enum fault_kind, or-ed */
    uint64_t offset_bytes;   /* requests that touch [offset, offset + length) of the device; length 0: all; */
    uint64_t length_bytes;   /* syncs touch everything */
    uint64_t skip;           /* so many matching requests pass unharmed first */
    uint64_t count;          /* then so many meet the fault; 0: no end */
    uint32_t per_million;    /* chance of each */
    uint32_t error;
    uint64_t argument;
    uint64_t matched;        /* requests that met the conditions but chance */
    uint64_t applied;        /* requests that met the fault */
};

enum fault_record_kind {
    FAULT_RECORD_WRITE = 1,    /* a write is about to start; its data follows */
    FAULT_RECORD_SYNC = 2,     /* a flush is about to start */
    FAULT_RECORD_DISCARD = 3,
    FAULT_RECORD_DONE = 4,     /* the request is answered with `status` */
    FAULT_RECORD_ACCESS = 5    /* a read or a write (`opcode`) is about to start */
};

struct fault_record {
    uint32_t magic;
    uint32_t kind;             /* enum fault_record_kind */
    uint64_t identity;
    uint64_t offset_bytes;
    uint64_t length_bytes;
    uint32_t status;           /* enum atoll_status */
    uint32_t opcode;
};

struct fault;
uint64_t fault_role_bytes(void);
/* `record_fd`: -1, or a file that stays the caller's. NULL with the reason in `error` (256 bytes). */
struct fault *fault_attach(struct atoll_domain *domain, struct disk *disk, int record_fd, bool accesses, char *error);
void fault_detach(struct fault *fault);
/* True once, in the role's first incarnation: rules of the configuration are still to be set. */
bool fault_is_fresh(struct fault *fault);
void fault_set(struct fault *fault, const struct fault_rule *rules, uint32_t count, uint64_t seed);
uint32_t fault_rules(struct fault *fault, struct fault_rule *rules);
uint32_t fault_release(struct fault *fault);
uint64_t fault_record_bytes(struct fault *fault);
/* cffi:end */

#endif
