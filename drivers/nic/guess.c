/*
 * Guesses: a client that shares nic's processor has sent its next request when nic, which gave way after the last reply, is back.
 *
 * Then nic receives without asking epoll first, which would be one more system call for each request where they come one by one. A
 * client on another processor has not sent yet: what guesses have brought lately decides how often there is one (spin.h). Only with
 * a single connection, so that nobody's request waits until epoll is asked.
 *
 * After a crash: nothing; a receive on a guess is a receive like any other.
 */
#include "drivers/nic/nic.h"
#include "ipc/spin.h"

void nic_guess_due(struct nic *nic, uint32_t connection)
{
    nic->guess.connection = connection;
    nic->guess.due = true;
}

bool nic_guess(struct nic *nic)
{
    struct nic_guess *guess = &nic->guess;
    if (!guess->due)
        return false;
    guess->due = false;
    if (nic_connections(nic) != 1 || !atoll_luck_tries(&guess->luck))
        return false;
    guess->made = true;
    nic->hints[guess->connection].readable = true;
    nic_schedule(nic, guess->connection);
    return true;
}

void nic_guess_over(struct nic *nic, bool right)
{
    if (!nic->guess.made)
        return;
    nic->guess.made = false;
    if (right) {
        nic->guess.luck.vain = 0;
        atoll_count(nic->domain, NIC_GUESSED, 1);
    } else {
        atoll_luck_vain(&nic->guess.luck, 1);
    }
}
