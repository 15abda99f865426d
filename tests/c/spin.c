/* When a domain spins before it sleeps, for how long, and when it leaves off: by a clock and a sched_yield of the test's own. */
/* link: ipc/domain.c */
#define _GNU_SOURCE
#include <sched.h>
#include <time.h>

#include "arena_support.h"

static uint64_t clock_ns = 1000000, turn_ns = 1000, turns, message_at_turn;
static struct atoll_domain domain, peer;

static void send_message(void)
{
    struct atoll_descriptor message = {.opcode = 3};
    CHECK(atoll_domain_put(&peer, ATOLL_ROLE_NBD, &message));
    atoll_domain_commit(&peer);
}

static int turn(void)
{
    CHECK(domain.self->sleeping == 0); /* who spins need not be woken */
    clock_ns += turn_ns;
    if (++turns == message_at_turn)
        send_message();
    return 0;
}

static uint64_t clock_now(void) { return clock_ns; }

#define sched_yield turn
#define atoll_now_ns clock_now
#include "ipc/spin.c"

/* One wait of a kind that had `work` before; true if it spun. */
static bool spins(struct atoll_spin *spin, bool work, bool *found)
{
    turns = 0;
    if (work)
        atoll_set64(domain.journal, &domain.self->current, domain.self->current + 1);
    atoll_domain_commit(&domain); /* an empty step is no work */
    *found = atoll_domain_spin(&domain, spin, 0, 0, 0);
    return turns != 0 || *found;
}

static void take(void)
{
    struct atoll_descriptor message;
    while (atoll_domain_take(&domain, ATOLL_ROLE_NIC, &message))
        ;
}

/* What else it looks at: there from `there_ns` on. */
static uint64_t looks, there_ns, message_at_look;

static bool see(void *context)
{
    CHECK(context == &there_ns);
    clock_ns += 250;
    if (++looks == message_at_look)
        send_message();
    return clock_ns >= there_ns;
}

/* A wait for what comes `after_ns` later; -1: never. True if it came while the domain did not give way. */
static bool holds(struct atoll_spin *spin, int64_t after_ns)
{
    uint64_t held = spin->held;
    turns = looks = 0;
    there_ns = after_ns < 0 ? UINT64_MAX : clock_ns + (uint64_t)after_ns;
    spin->spins = (struct atoll_luck){0};
    atoll_set64(domain.journal, &domain.self->current, domain.self->current + 1);
    atoll_domain_commit(&domain);
    CHECK(atoll_domain_spin(&domain, spin, 0, see, &there_ns) == (after_ns >= 0));
    CHECK(spin->held - held <= 1 && (spin->held == held || turns == 1));
    return spin->held != held;
}

int main(void)
{
    char error[256];
    struct atoll_spin spin = {0};
    bool found;
    make_arena(ATOLL_ROLE_KERNEL, 1u << ATOLL_ROLE_NBD | 1u << ATOLL_ROLE_NIC, 64, 0);
    make_arena(ATOLL_ROLE_NIC, 1u << ATOLL_ROLE_NBD | 1u << ATOLL_ROLE_KERNEL, 64, 0);
    make_arena(ATOLL_ROLE_NBD, 1u << ATOLL_ROLE_NIC | 1u << ATOLL_ROLE_KERNEL, 64, 0);
    CHECK(atoll_domain_open(&domain, ATOLL_ROLE_NBD, 1, 1, 0, arena_bytes, error) == 0);
    CHECK(atoll_domain_open(&peer, ATOLL_ROLE_NIC, 1, 1, 0, arena_bytes, error) == 0);

    CHECK(!spins(&spin, true, &found)); /* not unless it is told to */
    atoll_domain_set_spin(&domain, 50000);
    CHECK(spins(&spin, true, &found) && !found && turns == 50);
    CHECK(!spins(&spin, false, &found)); /* without work in between */

    /* In vain again and again: 1, 3, 7 ... 255 sleeps begin at once in between. */
    uint32_t expected = 1;
    for (uint32_t attempt = 0; attempt < 10; attempt++) {
        for (uint32_t rest = 0; rest < expected; rest++)
            CHECK(!spins(&spin, true, &found));
        CHECK(spins(&spin, true, &found) && !found);
        expected = expected * 2 + 1 < ATOLL_SPIN_REST ? expected * 2 + 1 : ATOLL_SPIN_REST;
    }
    CHECK(expected == ATOLL_SPIN_REST);

    /* Something comes: as soon as it turns out to be work, the next wait is a fresh start. */
    while (!spins(&spin, true, &found))
        ;
    for (uint32_t rest = 0; rest < ATOLL_SPIN_REST; rest++)
        CHECK(!spins(&spin, true, &found));
    message_at_turn = 20;
    CHECK(spins(&spin, true, &found) && found && turns == 20);
    take();
    message_at_turn = 0;
    CHECK(spins(&spin, true, &found) && !found && spin.spins.vain == 1 && spin.spins.rest == 1);

    /* What was found was no work: the rest of the same time is spun, not another whole one. */
    spin = (struct atoll_spin){0};
    message_at_turn = 30;
    CHECK(spins(&spin, true, &found) && found);
    CHECK(atoll_domain_pending(&domain, ATOLL_ROLE_NIC) == 1);
    take(); /* and nothing comes of it: no commit */
    message_at_turn = 0;
    turns = 0;
    CHECK(!atoll_domain_spin(&domain, &spin, 0, 0, 0) && turns == 20 && spin.spins.vain == 1);
    CHECK(!spins(&spin, true, &found) && spin.spins.vain == 1); /* work of later is not its luck */

    /* A message that is there at the very end counts, one that comes while somebody else computes is left to the sleep. */
    spin = (struct atoll_spin){0};
    message_at_turn = 50;
    CHECK(spins(&spin, true, &found) && found && spin.spins.vain == 0);
    take();
    turn_ns = ATOLL_SPIN_LOST_NS + 1;
    message_at_turn = 1;
    CHECK(spins(&spin, true, &found) && !found && turns == 1 && spin.spins.rest == 15);
    CHECK(!atoll_domain_may_sleep(&domain, 0)); /* and found there */
    take();

    /* While all who send to it sleep nothing can come; to notice that is not an attempt in vain. */
    spin = (struct atoll_spin){0};
    turn_ns = 1000;
    message_at_turn = 0;
    atoll_store_relaxed(&peer.self->sleeping, 1);
    CHECK(!spins(&spin, true, &found) && spin.spins.vain == 0);
    atoll_store_relaxed(&peer.self->sleeping, 0);
    CHECK(spins(&spin, true, &found) && !found && turns == 50);

    /* Who holds the processor gives way once and then looks on; what comes later than that is seen between two turns. */
    spin = (struct atoll_spin){.hold_ns = 10000};
    CHECK(!holds(&spin, 900) && turns == 1 && looks == 1); /* in the first turn already */
    CHECK(holds(&spin, 5000) && looks > 10);
    CHECK(holds(&spin, 10500) && spin.holds.rest == 0);
    CHECK(!holds(&spin, 30000) && turns > 10 && spin.holds.vain == 1);
    CHECK(!holds(&spin, 5000) && turns > 1); /* one occasion is let pass */
    CHECK(holds(&spin, 5000) && spin.holds.vain == 0);

    /* In vain again and again: it gives way all the time but for one wait in 256. */
    for (uint32_t wait = 0; wait < 1000; wait++)
        CHECK(!holds(&spin, -1));
    uint32_t tried = 0;
    for (uint32_t wait = 0; wait < 2 * (ATOLL_SPIN_REST + 1); wait++) {
        uint32_t rest = spin.holds.rest;
        CHECK(!holds(&spin, -1));
        tried += rest == 0;
    }
    CHECK(tried == 2);

    /* A message is seen, too, but it is not what is waited for. And who is not to hold does not. */
    spin = (struct atoll_spin){.hold_ns = 10000, .holds.vain = 2};
    message_at_turn = 1;
    CHECK(spins(&spin, true, &found) && found && turns == 1 && spin.held == 0); /* it came in a turn of others */
    take();
    message_at_turn = 0;
    turns = looks = 0;
    there_ns = UINT64_MAX;
    message_at_look = 3;
    CHECK(atoll_domain_spin(&domain, &spin, 0, see, &there_ns) && turns == 1 && looks == 3);
    CHECK(spin.held == 0 && spin.holds.vain == 2);
    take();
    message_at_look = 0;
    spin.hold_ns = 0;
    CHECK(!holds(&spin, 5000) && turns > 1);
    puts("spin: ok");
    return 0;
}
