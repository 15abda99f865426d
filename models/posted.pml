/*
 * Posted writes and the space that is kept for them (SP-POST: drivers/nic/posted.c, services/dedup/datapath_posted.c): nic answers
 * writes before dedup has reserved their blocks, dedup says how many may be on their way, and gives what is kept for them to others
 * once it has forbidden them and none is on its way. Both are killed at any point. Can a posted write arrive and find no room?
 *
 * Spin is sequentially consistent, processors are not: dedup and nic have a store buffer each, a FIFO that drains into memory
 * whenever it likes (total store order, as x86-64). A full fence waits until the own buffer is empty. A step of dedup takes up to BATCH
 * messages; what it changes is in its own variables until its commit, which a death before it undoes.
 *
 *   spin -a posted.pml && cc -o pan pan.c && ./pan
 *
 *   -DNO_NIC_FENCE, -DNO_DEDUP_FENCE, -DNO_SECOND_LOOK, -DNO_COUNT, -DLATE    leave something out, or do it in
 *                            the wrong order: must fail
 *   -DWRITES=n (of each kind), -DKILLS=n (of each side), -DMOST=n (posted writes on their way)
 */
#ifndef WRITES
#define WRITES 3
#endif
#ifndef KILLS
#define KILLS 1
#endif
#ifndef MOST
#define MOST 1
#endif
/* As in datapath_posted.c: ROOM_TO_BEGIN, and half of it. */
#define BEGIN (4 * MOST)
#define END (2 * MOST)
#define BATCH 2

/* dedup's arena: `allowed` is published at once, not transactional. `room`: blocks that nobody has reserved. */
byte allowed = MOST;
short room = BEGIN;
byte done_committed = 0; /* posted writes that have been applied */
byte others = 0;         /* ordinary ones, each of a block that was free */
bool freed = 0;          /* somebody has trimmed */

/* nic's arena: `posting` is not transactional; posted writes that it has sent. */
bit posting = 0;
byte sent = 0;
byte taken = 0;          /* ENDs that it has seen of those */

/* The rings' indices, as the other side sees them. The ring between the two passes on each message once and in order, however late: that
 * is what the rings' model (takeover.pml) shows, and all that is asked of it here. */
byte done = 0, posted = 0;

byte dedup_deaths = 0, nic_deaths = 0;

mtype = { ALLOWED, DONE, POSTING, POSTED };
chan dedup_stores = [2] of { mtype, byte };
chan nic_stores = [2] of { mtype, byte };

active proctype dedup_buffer()
{
    byte value;
end:
    do
    :: atomic { dedup_stores?ALLOWED(value) -> allowed = value }
    :: atomic { dedup_stores?DONE(value) -> done = value }
    od
}

active proctype nic_buffer()
{
    byte value;
end:
    do
    :: atomic { nic_stores?POSTING(value) -> posting = value }
    :: atomic { nic_stores?POSTED(value) -> posted = value }
    od
}

#define DEDUP_MAY_DIE                                                             \
    if                                                                            \
    :: dedup_deaths < KILLS -> dedup_deaths++; goto successor                     \
    :: skip                                                                       \
    fi

/* posted_settle: its two halves. `own`: what was last stored to `allowed`. */
#define SETTLE_END                                                                \
    if                                                                            \
    :: own != 0 && have < END -> own = 0; dedup_stores!ALLOWED(0)                 \
    :: else                                                                       \
    fi

active proctype dedup()
{
    byte applied, ordinary, own = MOST, count;
    short have;
    byte keeps = MOST;
    goto work;

successor: /* rolled back; what was committed is published; posted_attach */
    empty(dedup_stores);
    own = allowed;
    keeps = MOST;
    dedup_stores!DONE(done_committed);

work:
    do
    :: done_committed == WRITES && others == WRITES -> break
    :: else ->
        have = room;
        applied = done_committed;
        ordinary = others;
        count = 0;
        do /* take_requests */
        :: count < BATCH && applied < posted -> /* a posted write: reserve(), of a block that was free */
            assert(have > 0);
            have--;
            applied++;
            count++
        :: count < BATCH && ordinary < WRITES && have - keeps > 0 -> have--; ordinary++; count++
        :: count < BATCH && ordinary < WRITES && have - keeps <= 0 && keeps != 0 -> /* posted_shut */
            if
            :: own != 0 -> own = 0; dedup_stores!ALLOWED(0)
            :: else
            fi;
            DEDUP_MAY_DIE;
#ifndef NO_DEDUP_FENCE
            empty(dedup_stores); /* SP-POST */
#endif
            if
            :: posting == 0 -> keeps = 0
            :: else -> break /* it waits */
            fi
        :: count < BATCH && ordinary < WRITES && have - keeps <= 0 && keeps == 0 -> ordinary++; count++ /* ENOSPC */
        :: break
        od;
        DEDUP_MAY_DIE;
#ifndef LATE
        SETTLE_END;
        DEDUP_MAY_DIE;
#endif
        atomic { room = have; done_committed = applied; others = ordinary }; /* commit point */
        DEDUP_MAY_DIE;
        dedup_stores!DONE(done_committed);
        DEDUP_MAY_DIE;
#ifdef LATE
        SETTLE_END;
#endif
        if
        :: !freed -> freed = 1; room = room + BEGIN
        :: skip
        fi;
        if
        :: own == 0 && room >= BEGIN ->
            own = MOST;
            keeps = MOST;
            dedup_stores!ALLOWED(MOST)
        :: else
        fi;
        DEDUP_MAY_DIE
    od
}

#define NIC_MAY_DIE                                                               \
    if                                                                            \
    :: nic_deaths < KILLS -> nic_deaths++; goto successor                         \
    :: skip                                                                       \
    fi

#define PUBLISH(value)                                                            \
    if                                                                            \
    :: own != value -> own = value; nic_stores!POSTING(value)                     \
    :: else                                                                       \
    fi

active proctype nic()
{
    byte send, take, most;
    bit own = 0;
    goto work;

successor: /* rolled back; what was committed is published; nic_posted_open */
    empty(nic_stores);
    nic_stores!POSTED(sent);
    own = posting;
    NIC_MAY_DIE;
#ifdef NO_COUNT
    PUBLISH(0);
#else
    if
    :: sent != taken -> PUBLISH(1)
    :: else -> PUBLISH(0)
    fi;
#endif

work:
    do
    :: taken == WRITES -> break
    :: else -> /* a turn of nic's */
        take = done;
        send = sent;
        most = allowed;
        if
        :: send < WRITES && most != 0 ->
            PUBLISH(1);
            NIC_MAY_DIE;
#ifndef NO_NIC_FENCE
            empty(nic_stores); /* SP-POST */
#endif
#ifndef NO_SECOND_LOOK
            most = allowed
#endif
        :: else
        fi;
        do
        :: send < WRITES && send - take < most -> send++
        :: break
        od;
        NIC_MAY_DIE;
        atomic { sent = send; taken = take }; /* commit point */
        NIC_MAY_DIE;
        nic_stores!POSTED(sent);
        NIC_MAY_DIE;
        if
        :: sent == taken -> PUBLISH(0) /* nic_posted_committed */
        :: else
        fi
    od
}
