/*
 * Where the driver runs. Where processors are few the domains of the data path share one (kernel/placement.py), and a storage
 * driver works beside them: what is written behind the clients' backs is written on another processor.
 *
 * Reads that clients wait for are another matter. Until one is there its path has nothing to do, and to hand it over on the
 * path's processor is a switch, where an idle processor, above all a virtual one, first has to wake up; so while most of
 * what it does is such reads, the driver runs on the path's processor. *Measured*: docs/experiments.md.
 *
 * Decided every DISK_PLACE_NS by the bytes of that time, with a distance between coming and going, so that a mixed load does
 * not make it go to and fro.
 *
 * After a crash: a successor begins beside the path.
 */
#include "drivers/disk/disk.h"

#include <stdlib.h>

#include "ipc/place.h"

/* Between two decisions; and so many requests at least, so that a few do not decide. */
#define DISK_PLACE_NS 5000000
#define DISK_PLACE_REQUESTS 32

struct disk_place {
    struct atoll_place *where;
    uint32_t requests;
    uint64_t awaited_bytes, bytes;
    uint64_t until_ns;
};

void disk_set_path_cpu(struct disk *disk, uint32_t cpu)
{
    struct atoll_place *where = disk->place != 0 ? 0 : atoll_place_open(cpu, 0, 0);
    if (where == 0)
        return;
    disk->place = calloc(1, sizeof *disk->place);
    if (disk->place != 0)
        disk->place->where = where;
    else
        atoll_place_close(where);
}

void place_close(struct disk *disk)
{
    if (disk->place != 0)
        atoll_place_close(disk->place->where);
    free(disk->place);
}

bool place_near(const struct disk *disk) { return disk->place != 0 && atoll_place_near(disk->place->where); }

void place_note(struct disk *disk, const struct atoll_descriptor *message)
{
    struct disk_place *place = disk->place;
    if (place == 0)
        return;
    place->requests++;
    place->bytes += message->length;
    if (message->opcode == ATOLL_OP_IO_READ && message->flags & ATOLL_FLAG_AWAITED)
        place->awaited_bytes += message->length;
}

void place_settle(struct disk *disk)
{
    struct disk_place *place = disk->place;
    if (place == 0 || place->requests < DISK_PLACE_REQUESTS)
        return;
    uint64_t now = atoll_now_ns();
    if (now < place->until_ns)
        return;
    bool near = atoll_place_near(place->where);
    if (!near && place->awaited_bytes >= place->bytes / 4 * 3)
        atoll_place_come(place->where);
    else if (near && place->awaited_bytes < place->bytes / 2)
        atoll_place_go(place->where);
    place->requests = 0;
    place->awaited_bytes = place->bytes = 0;
    place->until_ns = now + DISK_PLACE_NS;
}
