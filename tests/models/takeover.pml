/*
 * A takeover: who may write a role's arena, and that one process ends up doing so.
 *
 * A role has a lock (robust: free again at the death of its holder), an intent in the kernel's arena (which standby was
 * told), and standbys, each with an inbox for the promotion. The kernel may be killed at any step; its successor reads the intent
 * and goes on; so the same or two standbys may be told, by two kernels in a row or by one that loses its patience. The active process and a promoted standby may be
 * killed too. A standby maps the arena writable only while it holds the lock; one that finds the lock held by somebody alive withdraws.
 *
 * Mutation that must fail: -DNO_LOCK (the standby trusts the order it got).
 *
 * Properties: never two writers; the run ends with exactly one (while standbys last).
 */
#define STANDBYS 3
#define FIRST 3                /* the first active process; 0..2 are standbys */
#define NOBODY 255

byte lock = FIRST;             /* holder; the operating system frees it at the holder's death */
byte writers = 0;
bool alive[4];
bool ordered[STANDBYS];        /* the promotion lies in the inbox */
bool withdrawn[STANDBYS];      /* found the lock held */
bool given_up[STANDBYS];       /* by a kernel that lost its patience; it may still act on its order */
byte intent = NOBODY;          /* in the kernel's arena: survives the kernel */
byte kernel_deaths = 0;
byte role_deaths = 0;

#define ACTIVE (lock != NOBODY)
#define USABLE(standby) (alive[standby] && !withdrawn[standby] && !given_up[standby])

proctype process(byte me)
{
    if
    :: me == FIRST -> skip
    :: else ->
end_standby:
        atomic { ordered[me] -> ordered[me] = false };
#ifndef NO_LOCK
        if
        :: atomic { lock == NOBODY -> lock = me }
        :: atomic { lock != NOBODY -> withdrawn[me] = true }; goto out
        fi
#else
        lock = me
#endif
    fi;
    writers++;
    assert(writers == 1);
    if
    :: atomic { role_deaths < 2 -> role_deaths++; writers--; alive[me] = false;
                if :: lock == me -> lock = NOBODY :: else fi }
    :: skip
    fi;
out:
    skip
}

/* A kill of the kernel here: its successor starts from the arena alone. */
#define MAY_DIE if :: atomic { kernel_deaths < 2 -> kernel_deaths++; run kernel() }; goto dead :: skip fi

proctype kernel()
{
    byte choice;
    do
    :: ACTIVE ->
        MAY_DIE;
        intent = NOBODY;
        MAY_DIE;
end_watching:
        !ACTIVE
    :: else ->
        if
        :: intent != NOBODY && USABLE(intent) -> choice = intent
        :: else ->
            if
            :: USABLE(0) -> choice = 0
            :: USABLE(1) -> choice = 1
            :: USABLE(2) -> choice = 2
            :: !USABLE(0) && !USABLE(1) && !USABLE(2) -> break /* the zygote would fork more */
            fi
        fi;
        MAY_DIE;
        intent = choice;
        MAY_DIE;
        ordered[choice] = true;
        MAY_DIE;
        if
        :: (ACTIVE || !USABLE(choice))
        :: given_up[choice] = true     /* slow or hung: another one is told */
        fi
    od;
dead:
    skip
}

proctype monitor()
{
    timeout;
    assert(writers == 1 || (!USABLE(0) && !USABLE(1) && !USABLE(2)))
}

init
{
    atomic {
        alive[0] = true; alive[1] = true; alive[2] = true; alive[FIRST] = true;
        run process(FIRST); run process(0); run process(1); run process(2);
        run kernel(); run monitor()
    }
}
