/*
 * The ring's signalling (SP-TAIL and SP-SLEEP of ipc/atomics.h): no message is left while its consumer sleeps.
 *
 * Spin is sequentially consistent; so each process's stores go through a store buffer of its own (x86 TSO: a load may
 * pass an older store of the same process to another word). Buffers drain at any moment, by themselves, also after the
 * death of the process; a full fence waits until the own buffer is empty. One buffer cell a word is enough: each word has one writer.
 *
 * The producer publishes MESSAGES messages one by one and wakes the consumer if it sees it sleep. It may be killed
 * once, at any point; its successor publishes the committed tail again and wakes without looking (every takeover wakes all peers).
 * The consumer: process, register (sleeping = 1), look again, sleep.
 *
 * -DEVENTFD     the consumer waits for its eventfd (nic, disk, kernel); otherwise for the futex word `tail`, which the
 *               system call compares in memory before it blocks (nbd, dedup)
 * Mutations, each of which must make the model fail:
 * -DNO_PRODUCER_FENCE   -DNO_CONSUMER_FENCE (eventfd)   -DNO_SECOND_LOOK (eventfd)   -DNO_TAKEOVER_WAKE
 *
 * Property: no invalid end state: the run ends with all messages consumed and the consumer at its label `end_idle`
 * (nothing pending), never with the consumer asleep before a published message.
 */
#ifndef MESSAGES
#define MESSAGES 3
#endif

/* Memory, and the one store that may still be in its writer's buffer. */
byte tail_memory = 0;      byte tail_buffer = 0;      bool tail_buffered = false;
bit  sleeping_memory = 0;  bit  sleeping_buffer = 0;  bool sleeping_buffered = false;

byte committed = 0;        /* tail_committed of the producer's arena: survives it */
byte consumed = 0;
bool blocked = false;      /* the consumer is in its wait */
byte event = 0;            /* eventfd counter, 0 or 1 */
bool killed = false;
bool producer_done = false;

/* Store buffers drain whenever they like. */
active proctype drain_tail()
{
end:
    do
    :: atomic { tail_buffered -> tail_memory = tail_buffer; tail_buffered = false }
    od
}
active proctype drain_sleeping()
{
end:
    do
    :: atomic { sleeping_buffered -> sleeping_memory = sleeping_buffer; sleeping_buffered = false }
    od
}

/* A second store to the same word waits for the first: order of stores is kept. */
inline store_tail(value) { atomic { !tail_buffered -> tail_buffer = value; tail_buffered = true } }
inline store_sleeping(value) { atomic { !sleeping_buffered -> sleeping_buffer = value; sleeping_buffered = true } }

inline wake()
{
#ifdef EVENTFD
    event = 1
#else
    blocked = false
#endif
}

proctype successor()
{
    store_tail(committed);
    !tail_buffered;                      /* ready long after; and it fences before it wakes */
#ifndef NO_TAKEOVER_WAKE
    wake();
#endif
    do
    :: committed < MESSAGES ->
        committed++;
        store_tail(committed);
#ifndef NO_PRODUCER_FENCE
        !tail_buffered;                  /* full fence */
#endif
        if
        :: sleeping_memory == 1 -> wake()
        :: else
        fi
    :: else -> break
    od;
    producer_done = true
}

active proctype producer()
{
    {
        do
        :: committed < MESSAGES ->
            committed++;                 /* COMMIT POINT of the step */
            store_tail(committed);
#ifndef NO_PRODUCER_FENCE
            !tail_buffered;              /* full fence */
#endif
            if
            :: sleeping_memory == 1 -> wake()
            :: else
            fi
        :: else -> break
        od;
        producer_done = true
    } unless { killed };
    if
    :: killed && !producer_done -> run successor()
    :: else
    fi
}

active proctype killer()
{
    if
    :: killed = true
    :: skip
    fi
}

active proctype consumer()
{
    byte seen;
    do
    :: consumed == MESSAGES -> break
    :: else ->
        seen = tail_memory;
        if
        :: seen != consumed -> consumed = seen
        :: else ->
            store_sleeping(1);
#ifndef NO_CONSUMER_FENCE
            !sleeping_buffered;          /* full fence */
#endif
#ifndef NO_SECOND_LOOK
            seen = tail_memory;
#endif
            if
            :: seen != consumed -> skip
            :: else ->
#ifdef EVENTFD
                atomic { event == 1 -> event = 0 }
#else
                /* The system call fences, compares in memory and blocks, all in one against a wake. */
                !sleeping_buffered;
                atomic {
                    if
                    :: tail_memory == seen -> blocked = true
                    :: else -> blocked = false
                    fi
                };
                !blocked
#endif
            fi;
            store_sleeping(0)
        fi
    od
}
