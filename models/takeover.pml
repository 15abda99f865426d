/*
 * The takeover of a role (kernel/supervisor.py, kernel/standby.py): kernel, active process and standbys are killed at any
 * point. Can two processes ever write to the role's arena, can an older incarnation follow a newer one, can the role stay
 * empty?
 *
 * The kernel records its intent in its arena, then orders a standby to take over; the standby takes the role lock, maps
 * the arena writable, raises the incarnation. A death marks the lock. A SIGKILL sent is not a death seen: the killed one may
 * still do some steps. The kernel's successor knows only the records, the lock, and who is alive.
 *
 *   spin -a takeover.pml && cc -o pan pan.c && ./pan     (assertions: two writers, incarnation; "invalid end state": nobody
 *                                                         plays the role)
 *
 *   -DNO_INTENT     the order is sent before it is recorded            must fail
 *   -DNO_LOCK       the standby does not take the lock                 must fail together with either of the others
 *   -DIMPATIENT     a late standby is given up without seeing it dead  must fail: an old incarnation follows a new one
 *   -DNO_RESEND     the kernel's successor does not repeat an order    must fail: it may never have been sent
 */
#ifndef KERNEL_KILLS
#define KERNEL_KILLS 2
#endif
#ifndef DOMAIN_KILLS
#define DOMAIN_KILLS 2
#endif
#define PROCESSES 8 /* process numbers 1.. used at most */

mtype = { EMPTY, PROMOTING, RECOVERING, DYING };

/* The kernel's arena: its record of the role. */
mtype phase = EMPTY;
byte recorded = 0;    /* process */
byte incarnation = 0; /* as last ordered */

/* The role's lock: its living owner. */
byte owner = 0;

/* The role's arena. */
byte writers = 0, played = 0;

/* The operating system: who is alive, who has a SIGKILL under way, orders on their way. */
bit alive[PROCESSES + 1], killed[PROCESSES + 1];
chan orders[PROCESSES + 1] = [3] of { byte };
byte last_process = 0, kernel_deaths = 0, domain_deaths = 0;
bit late = 0; /* the kernel has once been impatient */

/* The operating system marks the lock first; from then on the dead one does nothing more. */
#define DIE                                                     \
    atomic {                                                    \
        if                                                      \
        :: owner == me -> owner = 0                             \
        :: else                                                 \
        fi;                                                     \
        if                                                      \
        :: writing -> writers--                                 \
        :: else                                                 \
        fi;                                                     \
        goto dead                                               \
    }

#define MAY_DIE                                                       \
    if                                                                \
    :: killed[me] -> DIE                                              \
    :: atomic { domain_deaths < DOMAIN_KILLS -> domain_deaths++; DIE } \
    :: skip                                                           \
    fi

/* Forked by the zygote: waits for its order, plays the role, for ever. */
proctype process(byte me)
{
    byte ordered;
    bit writing = 0;

end_standby:
    if
    :: orders[me]?ordered
    :: killed[me] -> DIE
    fi;
    MAY_DIE;
#ifndef NO_LOCK
    if
    :: atomic { owner == 0 -> owner = me }
    :: atomic { owner != 0 -> DIE } /* not needed: somebody alive plays the role */
    fi;
    MAY_DIE;
#endif
    atomic {
        writing = 1;
        writers++;
        assert(writers == 1)
    };
    MAY_DIE;
#ifdef NO_LOCK
    owner = me;
#endif
    atomic {
        assert(ordered > played);
        played = ordered
    };
    MAY_DIE;
end_serving: /* the kernel sees to it that this is somebody's end */
    if
    :: killed[me] -> DIE
    :: atomic { domain_deaths < DOMAIN_KILLS -> domain_deaths++; DIE }
    fi;
dead:
    alive[me] = 0
}

#define KERNEL_MAY_DIE                                                         \
    if                                                                         \
    :: kernel_deaths < KERNEL_KILLS -> kernel_deaths++; goto adopt             \
    :: skip                                                                    \
    fi

active proctype kernel()
{
    byte standby = 0, left, next;

adopt: /* Supervisor.adopt: what the dead one knew beside the record is gone; standbys that nobody recorded end */
    standby = 0;
    do
    :: phase == PROMOTING && alive[recorded] && owner != recorded ->
#ifdef NO_RESEND
        skip;
#else
        if
        :: nfull(orders[recorded]) -> orders[recorded]!incarnation /* twice does no harm */
        :: full(orders[recorded])
        fi;
#endif
        break
    :: else -> break
    od;

    do
    /* The zygote forks a standby; its death is seen. */
    :: phase == EMPTY && standby == 0 && last_process < PROCESSES ->
        atomic {
            last_process++;
            standby = last_process;
            alive[standby] = 1;
            run process(standby)
        };
        KERNEL_MAY_DIE
    :: standby != 0 && !alive[standby] && phase == EMPTY -> standby = 0

    /* decide, _promote */
    :: phase == EMPTY && standby != 0 && alive[standby] && owner != 0 ->
        left = owner;
        if
        :: left != 0 -> killed[left] = 1; owner != left /* recorded by nobody: it goes first */
        :: else
        fi;
        KERNEL_MAY_DIE
    :: phase == EMPTY && standby != 0 && alive[standby] && owner == 0 ->
        next = (incarnation > played -> incarnation : played) + 1;
#ifdef NO_INTENT
        orders[standby]!next;
        KERNEL_MAY_DIE;
#endif
        atomic { /* INTENT: one transaction of the kernel */
            incarnation = next;
            recorded = standby;
            phase = PROMOTING
        };
        standby = 0;
        KERNEL_MAY_DIE;
#ifndef NO_INTENT
        orders[recorded]!incarnation;
        KERNEL_MAY_DIE
#endif

    /* _observe */
    :: phase == PROMOTING && owner == recorded -> phase = RECOVERING; KERNEL_MAY_DIE

    /* late is dead */
    :: phase == PROMOTING && owner != recorded && alive[recorded] && !late ->
        late = 1;
#ifdef IMPATIENT
        phase = EMPTY;
#else
        phase = DYING;
        KERNEL_MAY_DIE;
        killed[recorded] = 1;
#endif
        KERNEL_MAY_DIE
    :: phase == DYING && !killed[recorded] && alive[recorded] -> killed[recorded] = 1 /* adopted so */

    /* _bury */
    :: phase != EMPTY && !alive[recorded] -> phase = EMPTY; KERNEL_MAY_DIE

    /* The service runs, and nobody will die any more; or the kernel is killed while all is quiet. */
    :: phase == RECOVERING && owner == recorded && played == incarnation && domain_deaths == DOMAIN_KILLS -> break
    :: phase == RECOVERING && kernel_deaths < KERNEL_KILLS -> kernel_deaths++; goto adopt
    od;
    assert(alive[recorded] && writers == 1)
}
