/* Two processes, a ring in each direction, killed again and again at chosen stores and at random instants: each message
 * arrives exactly once, in order. */
/* link: -DATOLL_STORE_HOOK ipc/domain.c ipc/spin.c */
#define _GNU_SOURCE
#include <sched.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "arena_support.h"

enum { A = ATOLL_ROLE_NIC, B = ATOLL_ROLE_NBD, ENTRIES = 16, MESSAGES = 150000, KILLS = 800 };

/* Each role area: how far it is. A sends 0, 1, 2, ...; B sends each back, changed; A compares. */
struct state {
    uint64_t sent, received;
    uint64_t damage;
};

static uint64_t stores_left = UINT64_MAX;

void atoll_store_hook(void)
{
    if (stores_left-- == 0)
        kill(getpid(), SIGKILL);
}

static uint64_t changed(uint64_t value) { return value * 0x9e3779b97f4a7c15u ^ 0x5555; }

static void take_part(uint32_t role, uint32_t incarnation, uint64_t die_after, struct state *state)
{
    struct atoll_domain domain;
    struct atoll_descriptor message;
    char error[256];
    uint32_t peer = role == A ? B : A;

    stores_left = die_after;
    CHECK(atoll_domain_open(&domain, role, incarnation, (uint32_t)getpid(), 0, arena_bytes, error) == 0);
    atoll_domain_serving(&domain);
    for (;;) {
        bool more = false;
        if (role == A) {
            /* A narrow window now and then: nothing that comes later then hides a message that was not published. */
            uint64_t window = state->sent / 500 % 2 ? 1 : 2 * ENTRIES;
            for (uint32_t batch = 0; batch < 2 * ENTRIES; batch++) {
                more = state->sent < MESSAGES && state->sent - state->received < window;
                message = (struct atoll_descriptor){.opcode = ATOLL_OP_REQUEST, .identity = state->sent};
                message.words[0] = message.words[3] = changed(state->sent);
                more = more && atoll_domain_put(&domain, B, &message);
                if (!more)
                    break;
                atoll_set64(domain.journal, &state->sent, state->sent + 1);
            }
        }
        for (uint32_t batch = 0; batch < 5; batch++) {
            if (role == B && atoll_ring_room(&domain.rings->tx[A]) == 0)
                break;
            if (!atoll_domain_take(&domain, peer, &message))
                break;
            if (message.identity != state->received || message.words[0] != changed(state->received) ||
                message.words[3] != message.words[0])
                atoll_set64(domain.journal, &state->damage, state->damage + 1);
            atoll_set64(domain.journal, &state->received, state->received + 1);
            if (role == B) {
                struct atoll_descriptor answer = message;
                CHECK(atoll_domain_put(&domain, A, &answer));
            }
        }
        atoll_domain_commit(&domain);
        if (role == A && state->received == MESSAGES)
            _exit(0);
        if (role == A && state->sent < MESSAGES && state->sent == state->received)
            continue; /* nothing to wait for */
        /* No timeout: A waits for an answer, B for a message, so a lost wake-up is a hang. Only B's wait for room for its
         * answer has nobody to end it; a server's rings are never full. */
        if (more)
            continue;
        if (role == B && atoll_ring_room(&domain.rings->tx[A]) == 0)
            sched_yield();
        else
            atoll_domain_sleep(&domain, 0, -1);
    }
}

int main(int argc, char **argv)
{
    uint64_t random = seed_of(argc, argv), kills = 0;
    make_arena(ATOLL_ROLE_KERNEL, 1u << A | 1u << B, ENTRIES, 4096);
    struct state *states[ATOLL_ROLE_COUNT] = {[A] = make_arena(A, 1u << B, ENTRIES, 4096),
                                              [B] = make_arena(B, 1u << A, ENTRIES, 4096)};
    pid_t pids[ATOLL_ROLE_COUNT] = {0}, parent = getpid();
    uint32_t incarnations[ATOLL_ROLE_COUNT] = {0};

    alarm(120); /* a lost message is a hang; the children die with us */
    for (;;) {
        for (uint32_t role = A; role <= B; role++) {
            if (pids[role] != 0)
                continue;
            uint64_t die_after = kills < KILLS ? next_random(&random) % 3000 : UINT64_MAX;
            incarnations[role]++;
            pids[role] = fork();
            CHECK(pids[role] >= 0);
            if (pids[role] == 0) {
                prctl(PR_SET_PDEATHSIG, SIGKILL);
                if (getppid() != parent)
                    _exit(1);
                take_part(role, incarnations[role], die_after, states[role]);
            }
        }
        if (kills < KILLS && next_random(&random) % 4 == 0) { /* at any instant: also between the stores */
            struct timespec instant = {.tv_nsec = (long)(next_random(&random) % 300000)};
            nanosleep(&instant, 0);
            kill(pids[next_random(&random) % 2 ? A : B], SIGKILL);
        }
        int status;
        pid_t dead = wait(&status);
        CHECK(dead > 0);
        uint32_t role = dead == pids[A] ? A : B;
        if (WIFEXITED(status)) {
            CHECK(role == A && WEXITSTATUS(status) == 0);
            break;
        }
        CHECK(WTERMSIG(status) == SIGKILL);
        pids[role] = 0;
        kills++;
    }
    kill(pids[B], SIGKILL);
    waitpid(pids[B], 0, 0);
    printf("%llu kills; %llu sent, %llu came back, %llu damaged\n", (unsigned long long)kills,
           (unsigned long long)states[A]->sent, (unsigned long long)states[A]->received,
           (unsigned long long)(states[A]->damage + states[B]->damage));
    CHECK(states[A]->received == MESSAGES && states[A]->damage == 0 && states[B]->damage == 0);
    CHECK(kills >= 20);
    return 0;
}
