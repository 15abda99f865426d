/*
 * Reads that nic or nbd answers by itself, here nbd (ipc/lookup.c, services/dedup/datapath_lookup.c): a block lies in a page that
 * the look-up table names; it is overwritten, and its page given back and filled anew; nbd and dedup are killed at any point. Can a
 * client be sent another content than it asked for, or one older than it has been told of?
 *
 * Version v of the block lies in page v % 2, so each page is used again. Spin is sequentially consistent, processors are not:
 * dedup and nbd have a store buffer each, a FIFO that drains into memory whenever it likes (total store order, as x86-64). A full
 * fence waits until the own buffer is empty. What the transaction changes is changed here at its commit. nic, which does the same for
 * small reads, is an nbd whose message to nic takes no time.
 *
 *   spin -a lookup.pml && cc -o pan pan.c && ./pan
 *
 *   -DNO_NBD_FENCE, -DNO_DEDUP_FENCE, -DNO_SECOND_LOOK, -DNO_RETIRE, -DNO_USE    leave something out: must fail
 *   -DKEPT -DVERSIONS=2      the pages stay what they are (a place that other blocks share); with -DNO_TAKE_AWAY it must fail, too
 *   -DVERSIONS=n, -DREADS=n, -DKILLS=n  (of each side)
 */
#ifndef VERSIONS
#define VERSIONS 4
#endif
#ifndef READS
#define READS 2
#endif
#ifndef KILLS
#define KILLS 1
#endif
#define PAGE(version) ((version) % 2)

mtype = { ENTRY, GENERATION_0, GENERATION_1, RELEASED, TOLD };

/* dedup's arena. entry: the version that the table names, 0 none. released: pages of versions up to it are nic's again.
 * told: version whose write has been answered. */
byte entry = 0, generation[2] = 0, released = 0, told = 0;
byte generation_of[VERSIONS + 1]; /* of the page, as the table's value has it */
/* Transactional. */
byte map = 0, released_committed = 0;

/* nbd's arena: request number * 4 + page + 1, 0 none. */
byte use = 0;

/* nic: requests done; what it sends; pages; the write on its way. */
byte done = 0, sending = 0, content[2] = 0, pending = 0;

byte dedup_deaths = 0, nbd_deaths = 0;

/* Stores on their way to memory. A dead process's stores arrive all the same. */
chan dedup_stores = [3] of { mtype, byte };
chan nbd_stores = [2] of { byte };

active proctype dedup_buffer()
{
    byte value;
end:
    do
    :: atomic { dedup_stores?ENTRY(value) -> entry = value }
    :: atomic { dedup_stores?GENERATION_0(value) -> generation[0] = value }
    :: atomic { dedup_stores?GENERATION_1(value) -> generation[1] = value }
    :: atomic { dedup_stores?RELEASED(value) -> released = value }
    :: atomic { dedup_stores?TOLD(value) -> told = value }
    od
}

active proctype nbd_buffer()
{
end:
    do
    :: nbd_stores?use
    od
}

#define DEDUP_MAY_DIE                                                             \
    if                                                                            \
    :: dedup_deaths < KILLS -> dedup_deaths++; goto successor                     \
    :: skip                                                                       \
    fi

/* Is the page of `old` used by a request that nic has not done with? */
#define LOOK_AT_USES                                                              \
    seen = use;                                                                   \
    used = seen != 0 && (seen - 1) % 4 == PAGE(old) && (seen - 1) / 4 > done

active proctype dedup()
{
    byte version, old, seen, own[2];
    bit used;
    goto work;

successor: /* a death is noticed when all stores of the dead are in memory; rolled back; what was committed is published */
    empty(dedup_stores);
    own[0] = generation[0];
    own[1] = generation[1];
    dedup_stores!TOLD(map);
    dedup_stores!RELEASED(released_committed);

work:
    do
    :: pending != 0 -> /* a write: one step */
        version = pending;
        old = map;
#ifndef NO_TAKE_AWAY
        dedup_stores!ENTRY(0); /* lookup_note */
#endif
        generation_of[version] = own[PAGE(version)];
        DEDUP_MAY_DIE;
        used = 0;
        if
        :: old != 0 ->
#ifdef KEPT
            used = 1
#else
#ifndef NO_RETIRE
            own[PAGE(old)]++;
            if /* lookup_retire */
            :: PAGE(old) == 0 -> dedup_stores!GENERATION_0(own[0])
            :: else -> dedup_stores!GENERATION_1(own[1])
            fi;
#endif
            DEDUP_MAY_DIE;
#ifndef NO_DEDUP_FENCE
            empty(dedup_stores); /* SP-USE, lookup_uses */
#endif
            LOOK_AT_USES
#endif
        :: else
        fi;
        DEDUP_MAY_DIE;
        atomic { /* commit point */
            map = version;
            pending = 0;
            if
            :: used
            :: else -> released_committed = old
            fi
        };
        DEDUP_MAY_DIE;
        dedup_stores!TOLD(map);
        DEDUP_MAY_DIE;
        dedup_stores!RELEASED(released_committed);
        DEDUP_MAY_DIE;
        dedup_stores!ENTRY(version) /* lookup_committed */
#ifndef KEPT
    :: map > 1 && released_committed < map - 1 -> /* log_settle of a later step */
        old = map - 1;
#ifndef NO_DEDUP_FENCE
        empty(dedup_stores);
#endif
        LOOK_AT_USES;
        if
        :: used
        :: else -> released_committed = old; dedup_stores!RELEASED(released_committed)
        fi
#endif
    :: map == VERSIONS -> break
    od
}

/* Receives the next version into a page that is its own again, sends what nbd has answered. */
active proctype nic()
{
    byte next = 1;
end:
    do
    :: pending == 0 && next <= VERSIONS && map == next - 1 && (next <= 2 || released >= next - 2) ->
        content[PAGE(next)] = next;
        pending = next;
        next++
    :: sending != 0 ->
        assert(content[PAGE(sending)] == sending);
        atomic { sending = 0; done++ }
    od
}

#define NBD_MAY_DIE                                                               \
    if                                                                            \
    :: nbd_deaths < KILLS -> nbd_deaths++; goto successor                         \
    :: skip                                                                       \
    fi

active proctype nbd()
{
    byte request = 0, known, version;

work:
    do
    :: request == READS -> break
    :: request < READS && done == request && sending == 0 ->
        known = told; /* of what it has told its clients before this request came */
        goto execute;
successor: /* the request is still in its ring */
        empty(nbd_stores);
execute:
        version = entry; /* look up */
        if
        :: version == 0 -> goto ask
        :: else
        fi;
#ifndef NO_USE
        nbd_stores!(request + 1) * 4 + PAGE(version) + 1; /* publish the use */
#endif
        NBD_MAY_DIE;
#ifndef NO_NBD_FENCE
        empty(nbd_stores); /* SP-USE */
#endif
#ifndef NO_SECOND_LOOK
        if /* look again */
        :: generation[PAGE(version)] != generation_of[version] -> goto ask
        :: else
        fi;
#endif
        NBD_MAY_DIE;
        assert(version >= known);
        atomic { sending = version; request++ }; /* commit point */
        goto work;
ask:
        atomic { done++; request++ }
    od
}
