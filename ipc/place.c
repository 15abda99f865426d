/* See place.h. */
#define _GNU_SOURCE
#include "ipc/place.h"

#include <sched.h>
#include <stdlib.h>

struct atoll_place {
    uint32_t cpu;
    bool near;         /* bound to `cpu` */
    cpu_set_t allowed; /* elsewhere */
};

/* Bound to this processor and no other. */
static bool is_bound(const cpu_set_t *set, uint32_t cpu) { return CPU_COUNT(set) == 1 && CPU_ISSET(cpu, set); }

struct atoll_place *atoll_place_open(uint32_t cpu, const uint32_t *elsewhere, uint32_t count)
{
    cpu_set_t now, allowed;
    if (cpu >= CPU_SETSIZE || sched_getaffinity(0, sizeof now, &now) != 0)
        return 0;
    allowed = now;
    if (elsewhere != 0) {
        CPU_ZERO(&allowed);
        for (uint32_t index = 0; index < count; index++)
            if (elsewhere[index] < CPU_SETSIZE)
                CPU_SET(elsewhere[index], &allowed);
    }
    bool near = is_bound(&now, cpu);
    if (CPU_COUNT(&allowed) < 2 || !CPU_ISSET(cpu, &allowed) || (elsewhere != 0 && !near))
        return 0;
    struct atoll_place *place = calloc(1, sizeof *place);
    if (place != 0)
        *place = (struct atoll_place){.cpu = cpu, .near = near, .allowed = allowed};
    return place;
}

void atoll_place_close(struct atoll_place *place) { free(place); }

bool atoll_place_near(const struct atoll_place *place) { return place->near; }

void atoll_place_come(struct atoll_place *place)
{
    cpu_set_t there;
    CPU_ZERO(&there);
    CPU_SET(place->cpu, &there);
    if (sched_getaffinity(0, sizeof place->allowed, &place->allowed) == 0 && CPU_ISSET(place->cpu, &place->allowed))
        place->near = sched_setaffinity(0, sizeof there, &there) == 0;
}

void atoll_place_go(struct atoll_place *place)
{
    cpu_set_t now;
    place->near = false;
    if (sched_getaffinity(0, sizeof now, &now) == 0 && is_bound(&now, place->cpu))
        (void)sched_setaffinity(0, sizeof place->allowed, &place->allowed);
}
