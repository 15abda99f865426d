/*
 * The volume table: changes of it, its form on the device, and the deletion of volumes in bounded steps.
 *
 * The table lies at the start of dedup's role area, where nbd and the kernel read it under each volume's version. A version is made odd
 * before the change and even only after its commit (store_volumes_publish), and it is not journaled: after a
 * rollback it is still odd, so no reader takes a half-changed or rolled-back entry for a good one.
 *
 * After a crash: store_attach publishes. A deletion goes on, after power loss too: the state DELETING is in the table on the device,
 * and what was freed is in the log.
 */
#include <stdio.h>
#include <time.h>

#include "ipc/crashpoint.h"
#include "services/dedup/store_internal.h"

static struct atoll_volume *volume_of(const struct store *store, uint32_t volume)
{
    assert(volume < ATOLL_VOLUME_COUNT);
    return &store->dedup->public->volumes[volume];
}

/* --- Versions -------------------------------------------------------------------------------------------------------- */

static struct atoll_volume *open_volume(struct store *store, uint32_t number)
{
    struct atoll_volume *volume = volume_of(store, number);
    store->area->volumes_open = 1;
    if ((volume->version & 1) == 0)
        atoll_store_release(&volume->version, volume->version + 1);
    atoll_full_fence(); /* odd before any change is seen */
    _Static_assert(offsetof(struct atoll_volume, generation) == 8, "all but version and id is journaled");
    atoll_save(store->journal, &volume->generation, sizeof *volume - 8);
    return volume;
}

void store_volumes_publish(struct store *store)
{
    if (!store->area->volumes_open)
        return;
    for (uint32_t number = 0; number < ATOLL_VOLUME_COUNT; number++) {
        struct atoll_volume *volume = volume_of(store, number);
        if (volume->version & 1)
            atoll_store_release(&volume->version, volume->version + 1);
    }
    store->area->volumes_open = 0;
}

/* --- On the device --------------------------------------------------------------------------------------------------- */

void store_volume_image(const struct store *store, uint32_t number, struct format_volume *image)
{
    const struct atoll_volume *volume = volume_of(store, number);
    memset(image, 0, sizeof *image);
    if (volume->generation == 0)
        return; /* never used: zeros */
    image->id = number;
    image->generation = volume->generation;
    image->state = volume->state;
    image->flags = volume->flags;
    image->threshold = volume->threshold;
    image->tier_threshold = volume->tier_threshold;
    image->name_bytes = volume->name_bytes;
    image->size_bytes = volume->size_bytes;
    image->created_s = volume->created_s;
    memcpy(image->name, volume->name, sizeof image->name);
}

bool store_volume_take(struct store *store, const struct format_volume *image)
{
    if (image->id >= ATOLL_VOLUME_COUNT || image->name_bytes > ATOLL_VOLUME_NAME_BYTES || image->state > ATOLL_VOLUME_DELETING ||
        image->size_bytes > FORMAT_VOLUME_BYTES_MAX || image->threshold > ATOLL_THRESHOLD_MAX ||
        image->tier_threshold > ATOLL_TIER_THRESHOLD_MAX)
        return false;
    struct atoll_volume *volume = open_volume(store, image->id);
    volume->id = image->id;
    volume->generation = image->generation;
    volume->state = image->state;
    volume->flags = image->flags;
    volume->threshold = image->threshold != 0 ? image->threshold : ATOLL_THRESHOLD_DEFAULT;
    volume->tier_threshold = image->tier_threshold != 0 ? image->tier_threshold : ATOLL_TIER_THRESHOLD_DEFAULT;
    volume->name_bytes = image->name_bytes;
    volume->size_bytes = image->size_bytes;
    volume->created_s = image->created_s;
    memcpy(volume->name, image->name, sizeof volume->name);
    return true;
}

/* Notes the volume as it is now. */
static void log_volume(struct store *store, uint32_t number)
{
    uint64_t records[1 + sizeof(struct format_volume) / 8];
    struct format_volume image;
    store_volume_image(store, number, &image);
    records[0] = FORMAT_RECORD(FORMAT_RECORD_VOLUME, number);
    memcpy(records + 1, &image, sizeof image);
    store_log_append(store, records, sizeof records / 8);
    store_mark_dirty(store, number / FORMAT_VOLUMES_PER_PAGE);
}

/* --- Changes --------------------------------------------------------------------------------------------------------- */

static int refuse(char *reason, enum atoll_status status, const char *text)
{
    snprintf(reason, 256, "%s", text);
    return (int)status;
}

/* The slack that store_has_room keeps has room for some dozens of these. */
static bool room_for_volume(struct store *store)
{
    const struct store_area *area = store->area;
    if (area->log_next - area->log_durable + 2 < STORE_LOG_BUFFER_BLOCKS && area->log_next - area->log_start + 2 < area->log_blocks)
        return true;
    if (!area->sync_wanted)
        STORE_SET(store, sync_wanted, 1);
    return false;
}

static int check(struct store *store, char *reason)
{
    reason[0] = 0;
    if (store->area->state != STORE_READY || store->area->closing)
        return refuse(reason, ATOLL_ESHUTDOWN, "the store is not open");
    if (!room_for_volume(store))
        return refuse(reason, ATOLL_ENOMEM, "the metadata log is full at the moment: try again");
    return ATOLL_OK;
}

static int check_size(uint64_t size_bytes, char *reason)
{
    if (size_bytes == 0 || size_bytes % 512 != 0)
        return refuse(reason, ATOLL_EINVAL, "a volume's size is a multiple of 512 bytes, and not 0");
    if (size_bytes > FORMAT_VOLUME_BYTES_MAX)
        return refuse(reason, ATOLL_EINVAL, "a volume holds at most 1 EiB");
    return ATOLL_OK;
}

static int check_thresholds(uint32_t threshold, uint32_t tier_threshold, char *reason)
{
    if (threshold > ATOLL_THRESHOLD_MAX)
        return refuse(reason, ATOLL_EINVAL, "a run threshold is 1 to 64 blocks");
    if (tier_threshold > ATOLL_TIER_THRESHOLD_MAX)
        return refuse(reason, ATOLL_EINVAL, "a tier threshold is 1 to 1,000,000 references");
    return ATOLL_OK;
}

int store_volume_create(struct dedup *dedup, const char *name, uint32_t name_bytes, uint64_t size_bytes, uint32_t flags,
                        uint32_t threshold, uint32_t tier_threshold, char *reason)
{
    struct store *store = dedup->store;
    uint32_t number = ATOLL_VOLUME_COUNT;
    int status = check(store, reason);
    if (status == ATOLL_OK)
        status = check_size(size_bytes, reason);
    if (status == ATOLL_OK)
        status = check_thresholds(threshold, tier_threshold, reason);
    if (status != ATOLL_OK)
        return status;
    if (name_bytes == 0 || name_bytes > ATOLL_VOLUME_NAME_BYTES)
        return refuse(reason, ATOLL_EINVAL, "a volume's name has 1 to 256 bytes");
    if (flags & ~(uint32_t)ATOLL_VOLUME_READONLY)
        return refuse(reason, ATOLL_EINVAL, "unknown volume flag");
    for (uint32_t each = ATOLL_VOLUME_COUNT; each-- > 0;) {
        const struct atoll_volume *other = volume_of(store, each);
        if (other->state == ATOLL_VOLUME_FREE)
            number = each;
        else if (other->state == ATOLL_VOLUME_READY && other->name_bytes == name_bytes && memcmp(other->name, name, name_bytes) == 0)
            return refuse(reason, ATOLL_EINVAL, "there is a volume of that name");
    }
    if (number == ATOLL_VOLUME_COUNT)
        return refuse(reason, ATOLL_ENOSPC, "the volume table is full");
    struct atoll_volume *volume = open_volume(store, number);
    assert(volume->mapped_blocks == 0);
    volume->id = number;
    volume->generation++;
    volume->state = ATOLL_VOLUME_READY;
    volume->flags = flags;
    volume->threshold = threshold != 0 ? threshold : ATOLL_THRESHOLD_DEFAULT;
    volume->tier_threshold = tier_threshold != 0 ? tier_threshold : ATOLL_TIER_THRESHOLD_DEFAULT;
    volume->size_bytes = size_bytes;
    volume->created_s = (uint64_t)time(0);
    volume->name_bytes = name_bytes;
    memset(volume->name, 0, sizeof volume->name);
    memcpy(volume->name, name, name_bytes);
    log_volume(store, number);
    return ATOLL_OK;
}

static int find_ready(struct store *store, uint32_t number, char *reason)
{
    if (number >= ATOLL_VOLUME_COUNT || volume_of(store, number)->state != ATOLL_VOLUME_READY)
        return refuse(reason, ATOLL_ENOENT, "there is no such volume");
    return ATOLL_OK;
}

int store_volume_set(struct dedup *dedup, uint32_t number, uint32_t threshold, uint32_t tier_threshold, char *reason)
{
    struct store *store = dedup->store;
    int status = check(store, reason);
    if (status == ATOLL_OK)
        status = find_ready(store, number, reason);
    if (status == ATOLL_OK)
        status = check_thresholds(threshold, tier_threshold, reason);
    if (status != ATOLL_OK)
        return status;
    struct atoll_volume *volume = open_volume(store, number);
    if (threshold != 0)
        volume->threshold = threshold;
    if (tier_threshold != 0)
        volume->tier_threshold = tier_threshold;
    log_volume(store, number);
    return ATOLL_OK;
}

int store_volume_resize(struct dedup *dedup, uint32_t number, uint64_t size_bytes, char *reason)
{
    struct store *store = dedup->store;
    int status = check(store, reason);
    if (status == ATOLL_OK)
        status = find_ready(store, number, reason);
    if (status == ATOLL_OK)
        status = check_size(size_bytes, reason);
    if (status != ATOLL_OK)
        return status;
    if (size_bytes < volume_of(store, number)->size_bytes)
        return refuse(reason, ATOLL_EINVAL, "a volume can only grow");
    open_volume(store, number)->size_bytes = size_bytes;
    log_volume(store, number);
    return ATOLL_OK;
}

int store_volume_delete(struct dedup *dedup, uint32_t number, char *reason)
{
    struct store *store = dedup->store;
    int status = check(store, reason);
    if (status == ATOLL_OK)
        status = find_ready(store, number, reason);
    if (status != ATOLL_OK)
        return status;
    open_volume(store, number)->state = ATOLL_VOLUME_DELETING;
    log_volume(store, number);
    return ATOLL_OK;
}

/* --- Deletion, step by step ------------------------------------------------------------------------------------------ */

/* Frees up to STORE_DELETE_ENTRIES entries of a leaf from `first` on, in one group of records. Returns true if a logged entry was left. */
static bool free_entries(struct store *store, uint32_t number, uint64_t frame, uint32_t first)
{
    uint64_t records[2 + 2 * STORE_DELETE_ENTRIES];
    const uint64_t *entries = store_frame(store, frame);
    uint64_t lba = FORMAT_KEY_NUMBER(store->frame_key[frame] - 1) * FORMAT_LEAF_ENTRIES;
    uint32_t end = first + STORE_DELETE_ENTRIES;
    bool logged = false;
    /* Runs of entries without a logged one among them. */
    for (uint32_t index = first; index < end;) {
        uint32_t words = 2, start = index;
        for (; index < end && MAP_KIND(entries[index]) != MAP_LOG; index++) {
            words += store_drop_value(store, entries[index], records + words);
            store_set_entry(store, frame, index, 0);
        }
        if (index > start) {
            records[0] = FORMAT_RECORD(FORMAT_RECORD_HOLES, FORMAT_KEY(number, lba + start));
            records[1] = index - start;
            store_log_append(store, records, words);
        }
        for (; index < end && MAP_KIND(entries[index]) == MAP_LOG; index++)
            logged = true;
    }
    store_mark_dirty(store, store->shape.leaves_base + frame);
    return logged;
}

bool store_delete_step(struct store *store)
{
    struct store_area *area = store->area;
    if (area->delete_volume == 0) {
        uint32_t number = 0;
        while (number < ATOLL_VOLUME_COUNT && volume_of(store, number)->state != ATOLL_VOLUME_DELETING)
            number++;
        if (number == ATOLL_VOLUME_COUNT)
            return false;
        STORE_SET(store, delete_volume, number + 1);
        STORE_SET(store, delete_frame, 0);
        STORE_SET(store, delete_index, 0);
        STORE_SET(store, delete_again, 0);
    }
    uint32_t number = (uint32_t)area->delete_volume - 1;
    for (uint32_t work = 0; work < 4096;) {
        if (area->delete_frame == area->frames_high) {
            if (area->delete_again) { /* logged entries: they end when the datapath has destaged or dropped them */
                STORE_SET(store, delete_volume, 0);
                return false;
            }
            if (!room_for_volume(store))
                return false;
            open_volume(store, number)->state = ATOLL_VOLUME_FREE;
            log_volume(store, number);
            STORE_SET(store, delete_volume, 0);
            return true;
        }
        uint64_t key = store->frame_key[area->delete_frame];
        if (key == 0 || FORMAT_KEY_VOLUME(key - 1) != number || store->frame_used[area->delete_frame] == 0 ||
            area->delete_index == FORMAT_LEAF_ENTRIES) {
            STORE_ADD(store, delete_frame, 1);
            STORE_SET(store, delete_index, 0);
            work += 4;
            continue;
        }
        if (!store_has_room(store->dedup, 2 * STORE_DELETE_ENTRIES))
            return false;
        ATOLL_CRASH_POINT(store->dedup->domain, "dedup.store.delete");
        if (free_entries(store, number, area->delete_frame, (uint32_t)area->delete_index))
            STORE_SET(store, delete_again, 1);
        STORE_ADD(store, delete_index, STORE_DELETE_ENTRIES);
        work += 512;
    }
    return true;
}
