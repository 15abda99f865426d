/*
 * The volumes as dedup publishes them, read through their versions (ipc/layout.h) and kept while the version stays.
 *
 * After a crash of dedup in the middle of a change: the version stays odd until its successor has rolled back. Nobody spins on
 * that: the caller leaves its message in the ring and comes again.
 */
#include "services/nbd/nbd.h"

/* Looks at an entry before it is given up for now: a change takes dedup a few hundred nanoseconds. */
#define TRIES 64

static const struct atoll_volume *table(const struct nbd *nbd)
{
    const struct atoll_dedup_public *public = atoll_dedup_public(nbd->domain);
    return public == 0 ? 0 : public->volumes;
}

/* Brings the copy up to date. False: the entry is being changed. */
static bool refresh(struct nbd *nbd, const struct atoll_volume *volumes, uint32_t id)
{
    struct nbd_volume *cached = &nbd->volumes[id];
    const struct atoll_volume *volume = &volumes[id];

    for (int attempt = 0; attempt < TRIES; attempt++) {
        uint32_t version = atoll_load_acquire(&volume->version);
        if (cached->known && version == cached->copy.version)
            return true;
        if (version & 1)
            continue;
        cached->known = 0;
        memcpy(&cached->copy, volume, sizeof cached->copy);
        __atomic_thread_fence(__ATOMIC_ACQUIRE);
        if (atoll_load_relaxed(&volume->version) != version)
            continue;
        cached->copy.version = version;
        if (cached->copy.name_bytes > sizeof cached->copy.name)
            cached->copy.name_bytes = sizeof cached->copy.name;
        memcpy(cached->name, cached->copy.name, cached->copy.name_bytes);
        cached->name[cached->copy.name_bytes] = 0;
        cached->known = 1;
        return true;
    }
    return false;
}

enum nbd_look nbd_look(struct nbd *nbd, uint32_t id, uint32_t generation, const struct atoll_volume **volume)
{
    const struct atoll_volume *volumes = table(nbd);
    *volume = 0;
    if (volumes == 0 || id >= ATOLL_VOLUME_COUNT)
        return NBD_LOOK_GONE;
    if (!refresh(nbd, volumes, id))
        return NBD_LOOK_UNSTABLE;
    const struct atoll_volume *copy = &nbd->volumes[id].copy;
    if (copy->state != ATOLL_VOLUME_READY || copy->generation != generation)
        return NBD_LOOK_GONE;
    *volume = copy;
    return NBD_LOOK_READY;
}

const char *nbd_volume_name(struct nbd *nbd, uint32_t id, uint32_t generation)
{
    const struct atoll_volume *volume;
    return nbd_look(nbd, id, generation, &volume) == NBD_LOOK_READY ? nbd->volumes[id].name : "";
}

int nbd_volumes(struct nbd *nbd, struct atoll_volume *out)
{
    const struct atoll_volume *volumes = table(nbd);
    int count = 0;
    for (uint32_t id = 0; volumes != 0 && id < ATOLL_VOLUME_COUNT; id++) {
        if (!refresh(nbd, volumes, id))
            return -1;
        if (nbd->volumes[id].copy.state != ATOLL_VOLUME_READY)
            continue;
        out[count] = nbd->volumes[id].copy;
        out[count++].id = id;
    }
    return count;
}
