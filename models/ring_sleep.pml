/*
 * The signalling of a ring (ipc/domain.c: SP-SLEEP): a consumer that finds nothing goes to sleep, a producer wakes it only if
 * it sleeps, and both are killed and replaced at any point. Is there a way to sleep for ever with a message waiting?
 *
 * Spin is sequentially consistent, processors are not: each process has a store buffer, a FIFO that drains into memory
 * whenever it likes (total store order, as x86-64). A full fence waits until the own buffer is empty. Operating-system
 * calls do not drain it here, which is worse than the truth.
 *
 *   spin -a ring_sleep.pml && cc -o pan pan.c && ./pan       (an "invalid end state" is a consumer that sleeps for ever)
 *
 *   -DFUTEX                  a futex on the tail, which is compared before sleeping; else an eventfd, which is not
 *   -DNO_PRODUCER_FENCE, -DNO_CONSUMER_FENCE, -DNO_SECOND_LOOK, -DNO_WAKE_ALL    leave something out: must fail
 *   -DMESSAGES=n, -DKILLS=n  (of each side)
 */
#ifndef MESSAGES
#define MESSAGES 3
#endif
#ifndef KILLS
#define KILLS 2
#endif

/* Memory. `committed` and `taken` are the transactional words that a successor goes by. */
byte tail = 0, committed = 0, taken = 0;
bit sleeping = 0;

/* Stores on their way to memory. A dead process's stores arrive all the same. */
chan tail_stores = [2] of { byte };
chan sleeping_stores = [2] of { bit };

/* The operating system: an eventfd's counter (0 or not), or whether the consumer sleeps on the futex. */
bit event = 0, asleep = 0;
byte producer_deaths = 0, consumer_deaths = 0;

active proctype tail_buffer()
{
end:
    do
    :: tail_stores?tail
    od
}

active proctype sleeping_buffer()
{
end:
    do
    :: sleeping_stores?sleeping
    od
}

#define FENCE(buffer) empty(buffer)
#ifdef FUTEX
#define WAKE asleep = 0
#else
#define WAKE event = 1
#endif

#define PRODUCER_MAY_DIE                                                          \
    if                                                                            \
    :: producer_deaths < KILLS -> producer_deaths++; goto successor               \
    :: skip                                                                       \
    fi

active proctype producer()
{
    bit seen;
    goto work;

successor: /* atoll_domain_open, atoll_domain_serving */
    empty(tail_stores); /* a death is noticed when all stores of the dead are in memory */
    tail_stores!committed;
    PRODUCER_MAY_DIE;
#ifndef NO_WAKE_ALL
    FENCE(tail_stores);
    WAKE;
#endif
    PRODUCER_MAY_DIE;

work: /* atoll_domain_commit */
    do
    :: committed < MESSAGES ->
        committed++; /* commit point */
        PRODUCER_MAY_DIE;
        tail_stores!committed; /* SP-TAIL */
        PRODUCER_MAY_DIE;
#ifndef NO_PRODUCER_FENCE
        FENCE(tail_stores); /* SP-SLEEP */
#endif
        seen = sleeping;
        PRODUCER_MAY_DIE;
        if
        :: seen -> WAKE
        :: else
        fi;
        PRODUCER_MAY_DIE
    :: else -> break
    od
}

#define CONSUMER_MAY_DIE                                                          \
    if                                                                            \
    :: consumer_deaths < KILLS -> consumer_deaths++; goto successor               \
    :: skip                                                                       \
    fi

active proctype consumer()
{
    byte found;
    goto work;

successor:
    empty(sleeping_stores);
    asleep = 0;
    sleeping_stores!0;

work:
    do
    :: taken == MESSAGES -> break
    :: else ->
        found = tail;
        if
        :: found != taken ->
            CONSUMER_MAY_DIE;
            taken = found /* commit point */
        :: else ->
            sleeping_stores!1; /* atoll_domain_may_sleep */
            CONSUMER_MAY_DIE;
#ifndef NO_CONSUMER_FENCE
            FENCE(sleeping_stores); /* SP-SLEEP */
#endif
#ifndef NO_SECOND_LOOK
            found = tail;
            if
            :: found != taken -> goto awake
            :: else
            fi;
            CONSUMER_MAY_DIE;
#endif
#ifdef FUTEX
            atomic {
                if
                :: tail != taken /* EAGAIN */
                :: else -> asleep = 1
                fi
            };
            if
            :: asleep == 0
            :: consumer_deaths < KILLS -> consumer_deaths++; goto successor
            fi;
#else
            if
            :: atomic { event -> event = 0 }
            :: consumer_deaths < KILLS -> consumer_deaths++; goto successor
            fi;
#endif
awake:
            sleeping_stores!0; /* atoll_domain_awake */
            CONSUMER_MAY_DIE
        fi
    od
    assert(taken == MESSAGES && committed == MESSAGES)
}
