/*
 * Where dedup runs. Where processors are few it shares one with the rest of the data path (kernel/placement.py): to hand a small
 * request over there is a switch, and its work is a few microseconds.
 *
 * Large writes are another matter. Their bytes are received on the path's processor and hashed, compared and written by dedup: half of
 * the work each, tens of microseconds a request, beside which waking another processor is little. So while most of what it
 * takes is large writes, dedup runs wherever the server may, and the scheduler puts it where there is less to do.
 * *Measured*: docs/experiments.md.
 *
 * Decided every PLACE_MS by the bytes per request of that time, with a distance between going and coming, so that a mixed load
 * does not make it go to and fro.
 *
 * After a crash: a successor begins on the path's processor.
 */
#include "services/dedup/place.h"

/* Between two decisions; and so many requests at least, so that a few do not decide. */
#define PLACE_MS 5
#define PLACE_REQUESTS 16
/* Bytes written per request from which on it goes, and below which it comes back. */
#define PLACE_GO_BYTES 98304
#define PLACE_COME_BYTES 49152

void place_note(struct dedup_place *place, const struct atoll_descriptor *message)
{
    place->requests++;
    if (message->opcode == ATOLL_OP_WRITE)
        place->bytes += message->length;
}

bool place_shared(const struct dedup_place *place) { return place->where == 0 || atoll_place_near(place->where); }

void place_settle(struct dedup_place *place, uint64_t now_ms)
{
    if (place->where == 0 || place->requests < PLACE_REQUESTS || now_ms < place->until_ms)
        return;
    bool near = atoll_place_near(place->where);
    uint64_t mean = place->bytes / place->requests;
    if (near && mean >= PLACE_GO_BYTES)
        atoll_place_go(place->where);
    else if (!near && mean < PLACE_COME_BYTES)
        atoll_place_come(place->where);
    place->requests = 0;
    place->bytes = 0;
    place->until_ms = now_ms + PLACE_MS;
}
