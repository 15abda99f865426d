/* See io.h. Everything here but io_start works on the arena alone, in the transaction of the loop's current step. */
#define _GNU_SOURCE
#include "drivers/disk/io.h"

#include <errno.h>
#include <stdlib.h>

#include "ipc/crashpoint.h"

/* While clients wait for reads, and for a while after, since who reads goes on reading, the device has no more than this of the
 * background at a time. What it has already comes before a read, and this much keeps it nearly as busy as
 * all that dedup has under way, which is up to 64 times as much. *Measured*: docs/experiments.md, reads before destage. */
#define BACKGROUND_BYTES (1u << 20)
#define AWAITED_NS 100000000u
_Static_assert(ATOLL_IO_BLOCKS * ATOLL_BLOCK_BYTES <= BACKGROUND_BYTES, "each has a turn when the device has nothing else");

/* --- Ranks and queues -------------------------------------------------------------------------------------------- */

/* `flags` of its message. */
static enum disk_rank rank_of(const struct disk_slot *slot, uint32_t flags)
{
    switch (slot->opcode) {
    case ATOLL_OP_IO_READ:
        if (flags & ATOLL_FLAG_AWAITED)
            return DISK_AWAITED;
        return slot->length_bytes <= ATOLL_BLOCK_BYTES ? DISK_SMALL : DISK_BACKGROUND;
    case ATOLL_OP_IO_WRITE: return DISK_DESTAGE;
    default: return DISK_SMALL;
    }
}

uint32_t io_queued(const struct disk *disk)
{
    uint32_t sum = 0;
    for (uint32_t rank = 0; rank < DISK_RANKS; rank++)
        sum += disk->queues[rank].count;
    return sum;
}

static void enqueue(struct disk *disk, const struct disk_slot *slot)
{
    uint32_t number = disk_slot_number(disk, slot);
    struct disk_queue *queue = &disk->queues[disk->ranks[number]];
    queue->numbers[queue->count++] = number;
}

/* What it adds to the background's bytes when the device has it. */
static uint64_t background_bytes(const struct disk *disk, const struct disk_slot *slot)
{
    return disk->ranks[disk_slot_number(disk, slot)] >= DISK_BACKGROUND ? slot->length_bytes : 0;
}

/* The device has it, or has it no longer. */
static void note_given(struct disk *disk, const struct disk_slot *slot)
{
    disk->submitted++;
    disk->background_bytes += background_bytes(disk, slot);
}

static void note_back(struct disk *disk, const struct disk_slot *slot)
{
    disk->submitted--;
    disk->background_bytes -= background_bytes(disk, slot);
}

/* --- Answering --------------------------------------------------------------------------------------------------- */

static void send_done(struct disk *disk, uint64_t identity, uint32_t status, uint32_t code)
{
    struct atoll_descriptor message = {.opcode = ATOLL_OP_IO_DONE, .identity = identity, .status = (uint16_t)status};
    message.halves[0] = code;
    /* Room was there when the request was taken, and stays: see takeable() in disk.c. */
    bool sent = atoll_domain_put(disk->domain, ATOLL_ROLE_DEDUP, &message);
    assert(sent);
}

static uint32_t status_of(uint32_t code)
{
    switch (code) {
    case 0: return ATOLL_OK;
    case ENOSPC:
    case EDQUOT: return ATOLL_ENOSPC;
    default: return ATOLL_EIO;
    }
}

static void note_failure(struct disk *disk, const struct disk_slot *slot, uint32_t code)
{
    atoll_count(disk->domain, DISK_ERRORS, 1);
    if (disk->failure.count++ != 0)
        return;
    disk->failure.offset_bytes = slot->offset_bytes;
    disk->failure.length_bytes = slot->length_bytes;
    disk->failure.opcode = slot->opcode;
    disk->failure.code = code;
}

/* Ends a request. The state is the last word set, FREE the sign that buffers and place are dedup's again. */
static void answer(struct disk *disk, struct disk_slot *slot, uint32_t code)
{
    uint32_t status = status_of(code);
    if (disk->hook != 0)
        disk->hook->finished(disk->hook->context, disk, slot, status);
    if (code != 0)
        note_failure(disk, slot, code);
    send_done(disk, slot->identity, status, code);
    if (slot->state == DISK_SUBMITTED)
        note_back(disk, slot);
    if (disk->ranks[disk_slot_number(disk, slot)] == DISK_AWAITED && --disk->awaited == 0)
        disk->awaited_ns = atoll_now_ns();
    disk->in_flight--;
    atoll_set32(disk->domain->journal, &slot->state, DISK_FREE);
}

static void refuse(struct disk *disk, const struct atoll_descriptor *message)
{
    atoll_count(disk->domain, DISK_REFUSED, 1);
    send_done(disk, message->identity, ATOLL_EINVAL, EINVAL);
}

/* --- Suspects (I8) ------------------------------------------------------------------------------------------------ */

static struct atoll_suspect *suspects(const struct disk *disk)
{
    return (void *)((char *)disk->domain->self + ATOLL_SUSPECTS_OFFSET);
}

static struct atoll_suspect *find_suspect(const struct disk *disk, uint64_t identity)
{
    struct atoll_suspect *table = suspects(disk);
    for (uint32_t index = 0; index < ATOLL_SUSPECT_COUNT; index++)
        if (table[index].crashes != 0 && table[index].identity == identity)
            return &table[index];
    return 0;
}

bool io_any_suspect(const struct disk *disk)
{
    const struct atoll_suspect *table = suspects(disk);
    for (uint32_t index = 0; index < ATOLL_SUSPECT_COUNT; index++)
        if (table[index].crashes != 0)
            return true;
    return false;
}

void io_note_suspect(struct disk *disk)
{
    struct atoll_journal *journal = disk->domain->journal;
    uint64_t identity = disk->domain->self->current;
    if (identity == 0)
        return;
    struct atoll_suspect *found = find_suspect(disk, identity), *table = suspects(disk);
    if (found == 0) { /* a free place, else the first one's: there are never more suspects than messages at the ring's head */
        found = &table[0];
        for (uint32_t index = 0; index < ATOLL_SUSPECT_COUNT && found->crashes != 0; index++)
            found = &table[index];
        atoll_set64(journal, &found->identity, identity);
        atoll_set32(journal, &found->crashes, 0);
    }
    atoll_set32(journal, &found->crashes, found->crashes + 1);
    atoll_commit(journal);
}

/* True if this request must not be tried again. It stops being suspect with the step that answers or enters it. */
static bool poisoned(struct disk *disk, uint64_t identity)
{
    struct atoll_suspect *suspect = find_suspect(disk, identity);
    if (__builtin_expect(suspect == 0, 1))
        return false;
    bool refused = suspect->crashes >= 2;
    atoll_set32(disk->domain->journal, &suspect->crashes, 0);
    return refused;
}

/* --- Taking ------------------------------------------------------------------------------------------------------ */

static bool aligned(uint64_t value) { return value % ATOLL_BLOCK_BYTES == 0; }

static bool within_device(const struct disk *disk, uint64_t offset_bytes, uint64_t length_bytes)
{
    return aligned(offset_bytes) && aligned(length_bytes) && length_bytes != 0 && length_bytes <= disk->device_bytes &&
           offset_bytes <= disk->device_bytes - length_bytes;
}

/* True if the driver may let the device write to (`reading`) or read from [address, address + length). */
static bool buffer_allowed(const struct disk *disk, uint64_t address, uint64_t length, bool reading)
{
    const struct atoll_domain *domain = disk->domain;
    if (!aligned(address) || !aligned(length) || length == 0)
        return false;
    if (!reading)
        return atoll_reference_role(domain, address, length) != 0;
    uint64_t base = (uint64_t)(uintptr_t)domain->self + domain->self->buffer_offset;
    return address >= base && length <= domain->self->buffer_bytes &&
           address - base <= domain->self->buffer_bytes - length;
}

/* Adds a run of memory, joined with the one before it where they touch. */
static void add_run(struct disk_slot *slot, uint64_t address, uint64_t length)
{
    struct iovec *last = slot->iovec_count != 0 ? &slot->iovecs[slot->iovec_count - 1] : 0;
    if (last != 0 && (uint64_t)(uintptr_t)last->iov_base + last->iov_len == address)
        last->iov_len += length;
    else
        slot->iovecs[slot->iovec_count++] = (struct iovec){.iov_base = (void *)(uintptr_t)address, .iov_len = length};
}

/* Copies and checks what a read or write refers to. False: malformed. */
static bool gather(struct disk *disk, const struct atoll_descriptor *message, struct disk_slot *slot)
{
    bool reading = message->opcode == ATOLL_OP_IO_READ;
    uint64_t sum = 0;

    if (message->length > (uint64_t)ATOLL_IO_BLOCKS * ATOLL_BLOCK_BYTES ||
        !within_device(disk, message->words[0], message->length))
        return false;
    if (message->segment_count == 0) {
        if (!buffer_allowed(disk, message->address, message->length, reading))
            return false;
        add_run(slot, message->address, message->length);
        return true;
    }
    uint64_t list_bytes = (uint64_t)message->segment_count * sizeof(struct atoll_segment);
    if (message->segment_count > ATOLL_IO_BLOCKS || message->address % 8 != 0 ||
        !atoll_reference_in(disk->domain, ATOLL_ROLE_DEDUP, message->address, list_bytes))
        return false;
    const struct atoll_segment *list = (const void *)(uintptr_t)message->address;
    for (uint32_t index = 0; index < message->segment_count; index++) {
        struct atoll_segment segment;
        memcpy(&segment, (const void *)&list[index], sizeof segment);
        atoll_compiler_barrier(); /* what is checked is what is used */
        if (segment.kind != ATOLL_SEGMENT_DATA || !buffer_allowed(disk, segment.address, segment.length, reading))
            return false;
        add_run(slot, segment.address, segment.length);
        sum += segment.length;
    }
    return sum == message->length;
}

/* What a sync comes after. False: that makes no sense. */
static bool note_after(const struct atoll_descriptor *message, struct disk_slot *slot)
{
    for (uint32_t index = 0; index < DISK_AFTER; index++) {
        if (message->words[index] >> 32 >= ATOLL_IO_COUNT || message->words[index] == message->identity)
            return false;
        slot->after[index] = message->words[index];
    }
    return true;
}

/* Shortens what is to be transferred to slot->fate_bytes. */
static void truncate_runs(struct disk_slot *slot)
{
    uint64_t left = slot->fate_bytes;
    for (uint32_t index = 0; index < slot->iovec_count; index++) {
        if (slot->iovecs[index].iov_len >= left) {
            slot->iovecs[index].iov_len = left;
            slot->iovec_count = left != 0 ? index + 1 : index;
            return;
        }
        left -= slot->iovecs[index].iov_len;
    }
}

uint64_t disk_target_bytes(const struct disk_slot *slot)
{
    return slot->fate_bytes < slot->length_bytes ? slot->fate_bytes : slot->length_bytes;
}

void io_take(struct disk *disk, const struct atoll_descriptor *message)
{
    struct atoll_journal *journal = disk->domain->journal;
    uint64_t number = message->identity >> 32;

    if (poisoned(disk, message->identity)) {
        atoll_count(disk->domain, DISK_POISONED, 1);
        send_done(disk, message->identity, ATOLL_EPOISON, EIO);
        return;
    }
    if (number >= ATOLL_IO_COUNT) {
        refuse(disk, message);
        return;
    }
    struct disk_slot *slot = &disk->table->slots[number];
    if (slot->state != DISK_FREE) {
        /* The same request again gets the one answer that is coming; another one in a used slot is malformed. */
        if (slot->identity == message->identity)
            atoll_count(disk->domain, DISK_DROPPED, 1);
        else
            refuse(disk, message);
        return;
    }

    /* A FREE slot means nothing to a successor: it is filled directly, its state last and journalled. */
    slot->identity = message->identity;
    slot->opcode = message->opcode;
    slot->offset_bytes = message->words[0];
    slot->length_bytes = message->length;
    slot->done_bytes = 0;
    slot->arrival = disk->table->taken;
    slot->attempt = 0;
    slot->position = 0;
    slot->incarnation = disk->domain->incarnation;
    slot->iovec_first = 0;
    slot->iovec_count = 0;
    slot->fate_error = 0;
    slot->fate_bytes = UINT64_MAX;
    slot->fate_due_ns = 0;

    bool well_formed = false, nothing_to_do = false;
    switch (message->opcode) {
    case ATOLL_OP_IO_READ:
        well_formed = gather(disk, message, slot);
        atoll_count(disk->domain, DISK_READS, well_formed);
        atoll_count(disk->domain, DISK_READ_BYTES, well_formed ? message->length : 0);
        break;
    case ATOLL_OP_IO_WRITE:
        well_formed = gather(disk, message, slot);
        atoll_count(disk->domain, DISK_WRITES, well_formed);
        atoll_count(disk->domain, DISK_WRITE_BYTES, well_formed ? message->length : 0);
        break;
    case ATOLL_OP_IO_SYNC:
        well_formed = note_after(message, slot);
        slot->offset_bytes = 0;
        slot->length_bytes = 0;
        atoll_count(disk->domain, DISK_SYNCS, 1);
        break;
    case ATOLL_OP_IO_DISCARD:
        slot->length_bytes = message->words[1];
        well_formed = within_device(disk, slot->offset_bytes, slot->length_bytes);
        nothing_to_do = well_formed && !disk->discards;
        atoll_count(disk->domain, DISK_DISCARDS, well_formed);
        atoll_count(disk->domain, DISK_DISCARDS_IGNORED, nothing_to_do);
        break;
    default: break;
    }
    if (!well_formed) {
        refuse(disk, message);
        return;
    }
    if (nothing_to_do) {
        send_done(disk, message->identity, ATOLL_OK, 0);
        return;
    }
    if (disk->hook != 0) {
        disk->hook->taken(disk->hook->context, disk, slot);
        truncate_runs(slot);
    }
    atoll_set64(journal, &disk->table->taken, disk->table->taken + 1);
    atoll_set32(journal, &slot->state, DISK_QUEUED);
    disk->in_flight++;
    enum disk_rank rank = rank_of(slot, message->flags);
    disk->ranks[number] = (uint8_t)rank;
    disk->awaited += rank == DISK_AWAITED;
    enqueue(disk, slot);
}

/* --- Placing and starting ---------------------------------------------------------------------------------------- */

/* What places requests in one step. */
struct placing {
    struct disk_slot **started;
    uint32_t count, answered;
    uint64_t now_ns;
    bool awaited;  /* clients wait for reads, or did a moment ago */
    bool held;     /* something in the background waits for them, and so does all that comes after it */
    bool full;     /* the engine has no room left */
};

/* True for a sync before which something else must be done. Never of each other: the other one has arrived first. */
static bool comes_after(const struct disk *disk, const struct disk_slot *slot)
{
    for (uint32_t index = 0; slot->opcode == ATOLL_OP_IO_SYNC && index < DISK_AFTER; index++) {
        const struct disk_slot *other = &disk->table->slots[slot->after[index] >> 32];
        if (slot->after[index] != 0 && other->state != DISK_FREE && other->identity == slot->after[index] && other->arrival < slot->arrival)
            return true;
    }
    return false;
}

/* Places the request, or answers it. False: it stays in its queue. */
static bool place(struct disk *disk, struct disk_slot *slot, struct placing *placing)
{
    struct atoll_journal *journal = disk->domain->journal;
    uint32_t position = 0;
    if (slot->fate_due_ns > placing->now_ns) {
        if (slot->fate_due_ns < disk->next_due_ns)
            disk->next_due_ns = slot->fate_due_ns;
        return false;
    }
    if (comes_after(disk, slot))
        return false;
    if (slot->fate_bytes == 0) { /* the stand-in decided that nothing is done */
        answer(disk, slot, slot->fate_error);
        placing->answered++;
        return true;
    }
    uint64_t bytes = background_bytes(disk, slot);
    placing->held = placing->awaited && bytes != 0 && disk->background_bytes + bytes > BACKGROUND_BYTES;
    if (disk->engine == DISK_ENGINE_URING && !placing->full && !placing->held)
        placing->full = !uring_place(disk->uring, placing->count, &position);
    if (placing->full || placing->held)
        return false;
    atoll_set32(journal, &slot->position, position);
    atoll_set32(journal, &slot->incarnation, disk->domain->incarnation);
    atoll_set32(journal, &slot->state, DISK_SUBMITTED);
    note_given(disk, slot);
    placing->started[placing->count++] = slot;
    return true;
}

uint32_t io_place(struct disk *disk, struct disk_slot **started, uint32_t *answered)
{
    disk->next_due_ns = UINT64_MAX;
    if (io_queued(disk) == 0)
        return 0;
    struct placing placing = {.started = started, .now_ns = atoll_now_ns()};
    placing.awaited = disk->awaited != 0 || placing.now_ns - disk->awaited_ns < AWAITED_NS;
    for (uint32_t rank = 0; rank < DISK_RANKS; rank++) {
        struct disk_queue *queue = &disk->queues[rank];
        uint32_t kept = 0;
        for (uint32_t index = 0; index < queue->count; index++) {
            uint32_t number = queue->numbers[index];
            if (placing.held || !place(disk, &disk->table->slots[number], &placing))
                queue->numbers[kept++] = number;
        }
        queue->count = kept;
    }
    atoll_count(disk->domain, DISK_BACKGROUND_HELD, placing.held);
    *answered += placing.answered;
    return placing.count;
}

void io_start(struct disk *disk, struct disk_slot *const *started, uint32_t count)
{
    for (uint32_t index = 0; index < count; index++) {
        struct disk_slot *slot = started[index];
        if (disk->hook != 0)
            disk->hook->starting(disk->hook->context, disk, slot);
        if (disk->engine == DISK_ENGINE_URING)
            uring_write(disk->uring, disk, slot);
        else
            threads_start(disk->threads, slot, disk_target_bytes(slot) - slot->done_bytes);
    }
    if (disk->engine == DISK_ENGINE_URING)
        uring_enter(disk->uring, disk);
}

/* --- Outcomes ---------------------------------------------------------------------------------------------------- */

/* Back to the queue for another attempt. False: there were too many. */
static bool again(struct disk *disk, struct disk_slot *slot)
{
    struct atoll_journal *journal = disk->domain->journal;
    if (slot->attempt >= DISK_ATTEMPTS_MAX)
        return false;
    atoll_set32(journal, &slot->attempt, slot->attempt + 1);
    atoll_set32(journal, &slot->state, DISK_QUEUED);
    note_back(disk, slot);
    enqueue(disk, slot);
    return true;
}

/* The operating system did not do it, for a reason that is not the request's: interrupted by the death of the
 * process that started it (EINTR, ECANCELED; EFAULT when its memory was gone before the work began), or short of means. */
static bool repeatable(const struct disk *disk, const struct disk_slot *slot, int64_t code)
{
    if (code == EINTR || code == EAGAIN || code == ECANCELED)
        return true;
    return code == EFAULT && slot->incarnation != disk->domain->incarnation;
}

static void use_up(struct disk *disk, struct disk_slot *slot, uint64_t bytes)
{
    struct atoll_journal *journal = disk->domain->journal;
    uint32_t first = slot->iovec_first;
    atoll_set64(journal, &slot->done_bytes, slot->done_bytes + bytes);
    while (bytes != 0) {
        struct iovec *run = &slot->iovecs[first];
        assert(first < slot->iovec_count);
        if (bytes < run->iov_len) {
            atoll_set64(journal, (uint64_t *)(void *)&run->iov_base, (uint64_t)(uintptr_t)run->iov_base + bytes);
            atoll_set64(journal, (uint64_t *)(void *)&run->iov_len, run->iov_len - bytes);
            break;
        }
        bytes -= run->iov_len;
        first++;
    }
    atoll_set32(journal, &slot->iovec_first, first);
}

bool disk_apply(struct disk *disk, uint64_t user_data, int64_t result)
{
    uint32_t number = (uint32_t)(user_data >> 32) & 0xffff;
    struct disk_slot *slot = number < ATOLL_IO_COUNT ? &disk->table->slots[number] : 0;

    if (slot == 0 || slot->state != DISK_SUBMITTED || disk_user_data(slot) != user_data) {
        atoll_count(disk->domain, DISK_STALE, 1); /* applied before the predecessor's death, not let go of */
        return false;
    }
    if (slot->incarnation != disk->domain->incarnation)
        atoll_count(disk->domain, DISK_ADOPTED, 1);
    if (result < 0 && repeatable(disk, slot, -result) && again(disk, slot)) {
        atoll_count(disk->domain, DISK_REPEATED, 1);
        return true;
    }
    if (result < 0) {
        uint32_t code = (uint32_t)-result;
        if (slot->opcode == ATOLL_OP_IO_DISCARD && (code == EOPNOTSUPP || code == ENOSYS)) {
            disk->discards = false; /* a hint that this device does not take */
            atoll_count(disk->domain, DISK_DISCARDS_IGNORED, 1);
            code = 0;
        }
        answer(disk, slot, code);
        return true;
    }
    if (slot->opcode != ATOLL_OP_IO_READ && slot->opcode != ATOLL_OP_IO_WRITE) {
        answer(disk, slot, slot->fate_error);
        return true;
    }
    uint64_t left = disk_target_bytes(slot) - slot->done_bytes;
    if ((uint64_t)result >= left) {
        answer(disk, slot, slot->fate_error);
        return true;
    }
    if (result == 0) { /* the end of a file that is shorter than it was */
        answer(disk, slot, EIO);
        return true;
    }
    use_up(disk, slot, (uint64_t)result);
    atoll_count(disk->domain, DISK_SHORT, 1);
    if (!again(disk, slot))
        answer(disk, slot, EIO);
    return true;
}

/* --- Taking over ------------------------------------------------------------------------------------------------- */

static int compare_arrival(const void *left, const void *right)
{
    const struct disk_slot *a = *(struct disk_slot *const *)left, *b = *(struct disk_slot *const *)right;
    return a->arrival < b->arrival ? -1 : a->arrival > b->arrival;
}

void io_take_over(struct disk *disk)
{
    struct disk_slot *found[ATOLL_IO_COUNT];
    uint32_t count = 0;

    for (uint32_t number = 0; number < ATOLL_IO_COUNT; number++) {
        struct disk_slot *slot = &disk->table->slots[number];
        if (slot->state == DISK_FREE)
            continue;
        disk->in_flight++;
        disk->ranks[number] = (uint8_t)rank_of(slot, 0); /* who waits is not known any more */
        if (slot->state == DISK_SUBMITTED) {
            if (disk->engine == DISK_ENGINE_URING && uring_consumed(disk->uring, slot->position)) {
                note_given(disk, slot); /* its outcome is in the completion queue, or will be */
                continue;
            }
            atoll_count(disk->domain, DISK_REPEATED, 1);
            atoll_set32(disk->domain->journal, &slot->attempt, slot->attempt + 1);
            atoll_set32(disk->domain->journal, &slot->state, DISK_QUEUED);
        }
        found[count++] = slot;
    }
    qsort(found, count, sizeof found[0], compare_arrival);
    for (uint32_t index = 0; index < count; index++)
        enqueue(disk, found[index]);
    ATOLL_CRASH_POINT(disk->domain, "disk.recover.before");
    atoll_commit(disk->domain->journal);
    ATOLL_CRASH_POINT(disk->domain, "disk.recover.after");
}
