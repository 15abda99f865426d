/*
 * Sockets as plain descriptors, for systems that forbid io_uring. See engine.h.
 *
 * Operations are noted and performed by `flush`, after the commit of their intents, so that the rest of nic knows one
 * way of working.
 *
 * After a crash: the descriptors died with the process. All connections are dropped (nic_open), which the status says.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include "drivers/nic/engine.h"

enum verb { RECEIVE, SEND, ACCEPT, CLOSE };

struct operation {
    enum verb verb;
    uint32_t connection;
    int listener;
    struct iovec *vectors;
    uint32_t count;
    struct iovec one;
    uint64_t user_data;
};

struct nic_sockets {
    int fds[ATOLL_CONNECTION_COUNT];
    uint32_t count;
    struct operation operations[NIC_TURN_OPERATIONS];
};

static int sockets_open(struct nic *nic, const struct atoll_uring_parameters *parameters, char *error)
{
    (void)parameters;
    nic->sockets = calloc(1, sizeof *nic->sockets);
    if (nic->sockets == 0) {
        snprintf(error, 256, "out of memory");
        return -ENOMEM;
    }
    for (uint32_t index = 0; index < ATOLL_CONNECTION_COUNT; index++)
        nic->sockets->fds[index] = -1;
    struct rlimit limit; /* each connection is a descriptor here */
    if (getrlimit(RLIMIT_NOFILE, &limit) == 0 && limit.rlim_cur < limit.rlim_max) {
        limit.rlim_cur = limit.rlim_max;
        (void)setrlimit(RLIMIT_NOFILE, &limit);
    }
    return 0;
}

static void sockets_close(struct nic *nic)
{
    for (uint32_t index = 0; index < ATOLL_CONNECTION_COUNT; index++)
        if (nic->sockets->fds[index] >= 0)
            close(nic->sockets->fds[index]);
    free(nic->sockets);
}

static uint32_t sockets_room(struct nic *nic) { return NIC_TURN_OPERATIONS - nic->sockets->count; }

static struct operation *add(struct nic *nic, enum verb verb, uint32_t connection, uint64_t user_data)
{
    struct nic_sockets *sockets = nic->sockets;
    assert(sockets->count < NIC_TURN_OPERATIONS);
    struct operation *operation = &sockets->operations[sockets->count++];
    *operation = (struct operation){.verb = verb, .connection = connection, .user_data = user_data};
    nic->operation_count++;
    return operation;
}

static void sockets_receive(struct nic *nic, uint32_t connection, struct iovec *vectors, uint32_t count, uint64_t user_data)
{
    struct operation *operation = add(nic, RECEIVE, connection, user_data);
    operation->vectors = vectors;
    operation->count = count;
}

static void sockets_send(struct nic *nic, uint32_t connection, struct iovec *vectors, uint32_t count, uint64_t user_data)
{
    struct operation *operation = add(nic, SEND, connection, user_data);
    operation->vectors = vectors;
    operation->count = count;
}

static void sockets_drain(struct nic *nic, uint32_t connection, uint64_t user_data)
{
    struct operation *operation = add(nic, RECEIVE, connection, user_data);
    operation->one = (struct iovec){.iov_base = nic->scratch, .iov_len = NIC_STREAM_BYTES};
    operation->vectors = &operation->one;
    operation->count = 1;
}

static void sockets_accept(struct nic *nic, uint32_t connection, int listener, uint64_t user_data)
{
    add(nic, ACCEPT, connection, user_data)->listener = listener;
}

static void sockets_close_socket(struct nic *nic, uint32_t connection, uint64_t user_data)
{
    add(nic, CLOSE, connection, user_data);
}

static void sockets_watch(struct nic *nic, uint32_t connection, uint64_t user_data)
{
    (void)user_data;
    nic->hints[connection].descriptor_pending = false;
    if (nic->sockets->fds[connection] >= 0)
        nic_watch_descriptor(nic, connection, nic->sockets->fds[connection]);
}

static int32_t perform(struct nic *nic, struct operation *operation)
{
    int *fd = &nic->sockets->fds[operation->connection];
    struct msghdr message = {.msg_iov = operation->vectors, .msg_iovlen = operation->count};
    struct nic_connection *record = &nic->area->connections[operation->connection];
    ssize_t result = 0;
    switch (operation->verb) {
    case RECEIVE:
        result = recvmsg(*fd, &message, MSG_DONTWAIT);
        break;
    case SEND:
        result = sendmsg(*fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
        break;
    case ACCEPT:
        record->address_length = sizeof record->address;
        result = accept4(operation->listener, (struct sockaddr *)record->address, &record->address_length, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (result >= 0) {
            *fd = (int)result;
            result = 0;
        }
        break;
    case CLOSE:
        if (*fd >= 0)
            result = close(*fd);
        *fd = -1;
        break;
    }
    return result < 0 ? -errno : (int32_t)result;
}

static uint32_t sockets_flush(struct nic *nic)
{
    struct nic_sockets *sockets = nic->sockets;
    uint32_t count = sockets->count;
    for (uint32_t index = 0; index < count; index++)
        nic->outcomes[index] =
            (struct nic_outcome){.user_data = sockets->operations[index].user_data, .result = perform(nic, &sockets->operations[index])};
    sockets->count = 0;
    nic->vector_count = 0;
    return count;
}

static void sockets_retire(struct nic *nic) { (void)nic; }

const struct nic_engine nic_engine_sockets = {
    .open = sockets_open,
    .close = sockets_close,
    .room = sockets_room,
    .receive = sockets_receive,
    .send = sockets_send,
    .accept = sockets_accept,
    .close_socket = sockets_close_socket,
    .drain = sockets_drain,
    .watch = sockets_watch,
    .flush = sockets_flush,
    .retire = sockets_retire,
};
