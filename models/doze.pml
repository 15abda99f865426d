/*
 * Dozing (ipc/domain.c, SP-SLEEP): a consumer that has nothing to do looks again when a timer ends, and is woken before that only for
 * messages that cannot wait, or for many. Both sides are killed and replaced at any point. Is there a way for a message that
 * cannot wait, or for many, to wait for the timer?
 *
 * The timer ends here only where all that waits may wait: so a consumer that sleeps for ever (an "invalid end state") is one whose
 * messages wait for the timer against the rule. Store buffers as in ring_sleep.pml. A commit publishes one message or two.
 *
 *   spin -a doze.pml && cc -o pan pan.c && ./pan
 *
 *   -DNO_PRODUCER_FENCE, -DNO_CONSUMER_FENCE, -DNO_SECOND_LOOK, -DNO_WAKE_ALL, -DNO_HURRY (the producer does not look at what it
 *   publishes), -DNO_KIND (the consumer does not), -DNO_COUNT (the producer does not wake for many), -DNO_SECOND_COUNT (the
 *   consumer sleeps with many)                       leave something out: must fail
 *   -DMESSAGES=n, -DMANY=n, -DKILLS=n  (of each side)
 */
#ifndef MESSAGES
#define MESSAGES 3
#endif
#ifndef MANY
#define MANY 2
#endif
#ifndef KILLS
#define KILLS 1
#endif

mtype = { TAIL, HEAD, SLEEPING };
#define AWAKE 0
#define DOZING 2

/* Memory. `committed` and `taken` are the transactional words that a successor goes by. may_wait: ATOLL_FLAG_POSTED of each entry,
 * written before the tail that makes it seen. */
byte tail = 0, committed = 0, taken = 0, head = 0, sleeping = AWAKE;
bit may_wait[MESSAGES + 1];

chan producer_stores = [2] of { byte };
chan consumer_stores = [2] of { mtype, byte };

bit event = 0;
byte producer_deaths = 0, consumer_deaths = 0;

active proctype producer_buffer()
{
end:
    do
    :: producer_stores?tail
    od
}

active proctype consumer_buffer()
{
    byte value;
end:
    do
    :: atomic { consumer_stores?HEAD(value) -> head = value }
    :: atomic { consumer_stores?SLEEPING(value) -> sleeping = value }
    od
}

#define PRODUCER_MAY_DIE                                                          \
    if                                                                            \
    :: producer_deaths < KILLS -> producer_deaths++; goto successor               \
    :: skip                                                                       \
    fi

#define PUT                                                                       \
    if                                                                            \
    :: may_wait[next] = 1                                                         \
    :: may_wait[next] = 0; hurried = 1                                            \
    fi;                                                                           \
    next++

active proctype producer()
{
    byte next, seen;
    bit hurried, wake;
    goto work;

successor: /* atoll_domain_open, atoll_domain_serving */
    empty(producer_stores); /* a death is noticed when all stores of the dead are in memory */
    producer_stores!committed;
    PRODUCER_MAY_DIE;
#ifndef NO_WAKE_ALL
    empty(producer_stores);
    event = 1;
#endif
    PRODUCER_MAY_DIE;

work: /* atoll_domain_commit */
    do
    :: committed < MESSAGES ->
        next = committed;
        hurried = 0;
        PUT;
        if
        :: next < MESSAGES -> PUT
        :: skip
        fi;
        committed = next; /* commit point */
        PRODUCER_MAY_DIE;
        producer_stores!committed; /* SP-TAIL */
        PRODUCER_MAY_DIE;
#ifndef NO_PRODUCER_FENCE
        empty(producer_stores); /* SP-SLEEP */
#endif
        seen = sleeping;
        PRODUCER_MAY_DIE;
        wake = 0;
#ifndef NO_HURRY
        wake = hurried;
#endif
#ifndef NO_COUNT
        wake = wake || committed - head >= MANY;
#endif
        if
        :: seen == DOZING && wake -> event = 1
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

/* Does one of the messages [taken, found) have to be looked at now? */
#define LOOK(answer)                                                              \
    d_step {                                                                      \
        answer = 0;                                                               \
        index = taken;                                                            \
        do                                                                        \
        :: index < found -> answer = answer || !may_wait[index]; index++          \
        :: else -> break                                                          \
        od;                                                                       \
        index = 0                                                                 \
    }

/* What the rule says of all that can be seen. */
#define ALL_MAY_WAIT                                                              \
    (tail - taken < MANY &&                                                       \
     (tail <= taken || may_wait[taken]) && (tail <= taken + 1 || may_wait[taken + 1]))

active proctype consumer()
{
    byte found, index;
    bit now;
    goto work;

successor:
    empty(consumer_stores);
    consumer_stores!HEAD(taken);
    consumer_stores!SLEEPING(AWAKE);

work:
    do
    :: taken == MESSAGES -> break
    :: else ->
        found = tail;
        if
        :: found != taken ->
            CONSUMER_MAY_DIE;
            taken = found; /* commit point */
            CONSUMER_MAY_DIE;
            consumer_stores!HEAD(taken)
        :: true -> /* nothing, or it has just looked elsewhere */
            consumer_stores!SLEEPING(DOZING); /* atoll_domain_doze */
            CONSUMER_MAY_DIE;
#ifndef NO_CONSUMER_FENCE
            empty(consumer_stores); /* SP-SLEEP */
#endif
#ifndef NO_SECOND_LOOK
            found = tail; /* may_wait */
#ifndef NO_KIND
            LOOK(now);
            if
            :: now -> goto awake
            :: else
            fi;
#endif
#ifndef NO_SECOND_COUNT
            if
            :: found - taken >= MANY -> goto awake
            :: else
            fi;
#endif
            CONSUMER_MAY_DIE;
#endif
            if
            :: atomic { event -> event = 0 }
            :: ALL_MAY_WAIT && tail != taken /* the timer */
            :: consumer_deaths < KILLS -> consumer_deaths++; goto successor
            fi;
awake:
            consumer_stores!SLEEPING(AWAKE);
            CONSUMER_MAY_DIE
        fi
    od
    assert(taken == MESSAGES && committed == MESSAGES)
}
