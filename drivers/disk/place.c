/*
 * Where the driver runs. Where processors are few the domains of the data path share one (kernel/placement.py), and a storage
 * driver works beside them: what is written behind the clients' backs is written on another processor.
 *
 * Reads that clients wait for are another matter. Until one is there its path has nothing to do, and to hand it over on the
 * path's processor is a switch, where an idle processor, above all a virtual one, first has to wake up; so while most of
 * what it does is such reads, the driver runs on the path's processor. *Measured*: docs/performance.md.
 *
 * Decided every DISK_PLACE_NS by the bytes of that time, with a distance between coming and going, so that a mixed load does
 * not make it go to and fro. What the process was allowed at the moment of coming is what it goes back to; if somebody else
 * has bound it since, it stays where it was put.
 *
 * After a crash: a successor begins beside the path.
 */
#define _GNU_SOURCE
#include "drivers/disk/disk.h"

#include <sched.h>
#include <stdlib.h>

/* Between two decisions; and so many requests at least, so that a few do not decide. */
#define DISK_PLACE_NS 5000000
#define DISK_PLACE_REQUESTS 32

struct disk_place {
    uint32_t cpu;
    bool near;                  /* bound to `cpu` */
    cpu_set_t allowed;          /* before it was */
    uint32_t requests;
    uint64_t awaited_bytes, bytes;
    uint64_t until_ns;
};

void disk_set_path_cpu(struct disk *disk, uint32_t cpu)
{
    cpu_set_t allowed;
    if (disk->place != 0 || cpu >= CPU_SETSIZE || sched_getaffinity(0, sizeof allowed, &allowed) != 0 ||
        !CPU_ISSET(cpu, &allowed) || CPU_COUNT(&allowed) < 2)
        return;
    disk->place = calloc(1, sizeof *disk->place);
    if (disk->place != 0)
        disk->place->cpu = cpu;
}

void place_close(struct disk *disk) { free(disk->place); }

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

static void come(struct disk_place *place)
{
    cpu_set_t there;
    CPU_ZERO(&there);
    CPU_SET(place->cpu, &there);
    if (sched_getaffinity(0, sizeof place->allowed, &place->allowed) == 0 && CPU_ISSET(place->cpu, &place->allowed))
        place->near = sched_setaffinity(0, sizeof there, &there) == 0;
}

static void go(struct disk_place *place)
{
    cpu_set_t now;
    place->near = false;
    if (sched_getaffinity(0, sizeof now, &now) == 0 && CPU_COUNT(&now) == 1 && CPU_ISSET(place->cpu, &now))
        (void)sched_setaffinity(0, sizeof place->allowed, &place->allowed);
}

void place_settle(struct disk *disk)
{
    struct disk_place *place = disk->place;
    if (place == 0 || place->requests < DISK_PLACE_REQUESTS)
        return;
    uint64_t now = atoll_now_ns();
    if (now < place->until_ns)
        return;
    if (!place->near && place->awaited_bytes >= place->bytes / 4 * 3)
        come(place);
    else if (place->near && place->awaited_bytes < place->bytes / 2)
        go(place);
    place->requests = 0;
    place->awaited_bytes = place->bytes = 0;
    place->until_ns = now + DISK_PLACE_NS;
}
