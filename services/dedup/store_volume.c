/*
 * The volume table: changes of it, and its form on the device. (Deletion: store_delete.c.)
 *
 * The table lies at the start of dedup's role area, where nbd and the kernel read it under each volume's version. A version is made odd
 * before the change and even only after its commit (store_volumes_publish), and it is not journaled: after a
 * rollback it is still odd, so no reader takes a half-changed or rolled-back entry for a good one.
 *
 * After a crash: store_attach publishes.
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

struct atoll_volume *store_volume_open(struct store *store, uint32_t number)
{
    struct atoll_volume *volume = volume_of(store, number);
    store->area->volumes_open = 1;
    store->none_to_delete = false;
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
    image->mapped_blocks = store->area->checkpoint_mapped[number];
}

bool store_volume_take(struct store *store, const struct format_volume *image)
{
    if (image->id >= ATOLL_VOLUME_COUNT || image->name_bytes > ATOLL_VOLUME_NAME_BYTES || image->state > ATOLL_VOLUME_DELETING ||
        image->size_bytes > FORMAT_VOLUME_BYTES_MAX || image->threshold > ATOLL_THRESHOLD_MAX ||
        image->tier_threshold > ATOLL_TIER_THRESHOLD_MAX)
        return false;
    struct atoll_volume *volume = store_volume_open(store, image->id);
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
void store_volume_log(struct store *store, uint32_t number)
{
    uint64_t records[1 + sizeof(struct format_volume) / 8];
    struct format_volume image;
    store_volume_image(store, number, &image);
    image.mapped_blocks = 0; /* it follows from the log */
    records[0] = FORMAT_RECORD(FORMAT_RECORD_VOLUME, number);
    memcpy(records + 1, &image, sizeof image);
    store_log_append(store, records, sizeof records / 8);
    store_table_dirty(store, number / FORMAT_VOLUMES_PER_PAGE);
}

/* --- Changes --------------------------------------------------------------------------------------------------------- */

static int refuse(char *reason, enum atoll_status status, const char *text)
{
    snprintf(reason, 256, "%s", text);
    return (int)status;
}

/* The slack that store_has_room keeps has room for some dozens of these. */
bool store_volume_room(struct store *store)
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
    if (store_state(store->dedup) != STORE_READY || store->area->closing)
        return refuse(reason, ATOLL_ESHUTDOWN, "the store is not open");
    if (!store_volume_room(store))
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
    struct atoll_volume *volume = store_volume_open(store, number);
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
    store_volume_log(store, number);
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
    struct atoll_volume *volume = store_volume_open(store, number);
    if (threshold != 0)
        volume->threshold = threshold;
    if (tier_threshold != 0)
        volume->tier_threshold = tier_threshold;
    store_volume_log(store, number);
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
    store_volume_open(store, number)->size_bytes = size_bytes;
    store_volume_log(store, number);
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
    store_volume_open(store, number)->state = ATOLL_VOLUME_DELETING;
    store_volume_log(store, number);
    return ATOLL_OK;
}
