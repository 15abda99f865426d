/*
 * Sockets in the file table of the io_uring that init holds. See engine.h.
 *
 * The table's index is the connection number. Readiness: an epoll set made by each incarnation; a socket gets a descriptor
 * for the moment of its registration (IORING_OP_FIXED_FD_INSTALL, Linux 6.8); the registration lasts as long as the socket,
 * which the table keeps open. Without that operation: a multishot poll in the ring itself.
 *
 * All operations carry MSG_DONTWAIT or end at once by their nature, so each has its completion when
 * io_uring_enter returns; what died within io_uring_enter has its completion too.
 *
 * After a crash: the submission tail is set back (atoll_uring_attach), so what was not submitted never is. The sockets
 * are still in the table; a socket whose accept has a completion there is the connection's.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/utsname.h>
#include <unistd.h>

#include "drivers/nic/engine.h"

#define OPCODE_FIXED_FD_INSTALL 54 /* newer than Debian 12's headers */
#define ACCEPT_DONTWAIT 2          /* in ioprio, Linux 6.10 */

static bool kernel_is_at_least(int major, int minor)
{
    struct utsname name;
    int has_major = 0, has_minor = 0;
    if (uname(&name) < 0 || sscanf(name.release, "%d.%d", &has_major, &has_minor) != 2)
        return false;
    return has_major > major || (has_major == major && has_minor >= minor);
}

static int uring_open(struct nic *nic, const struct atoll_uring_parameters *parameters, char *error)
{
    int result = atoll_uring_attach(&nic->uring, nic->options.uring_fd, parameters, error);
    if (result < 0)
        return result;
    /* The operating system need not look the ring up at each call then; Linux 5.18. By this thread, which alone submits. */
    (void)io_uring_register_ring_fd(atoll_uring_inner(&nic->uring));
    nic->poll_in_ring = !kernel_is_at_least(6, 8) || nic->options.poll_in_ring;
    if (nic->poll_in_ring) {
        struct epoll_event event = {.events = EPOLLIN, .data.u64 = NIC_READY_RING};
        if (epoll_ctl(nic->epoll, EPOLL_CTL_ADD, nic->uring.fd, &event) < 0) {
            snprintf(error, 256, "cannot watch the io_uring: %s", strerror(errno));
            return -errno;
        }
    }
    nic->accept_flags = kernel_is_at_least(6, 10) ? ACCEPT_DONTWAIT : 0;
    nic->completions_seen = 0;
    return 0;
}

static void uring_close(struct nic *nic) { atoll_uring_detach(&nic->uring); }

static uint32_t uring_room(struct nic *nic)
{
    uint32_t room = atoll_uring_room(&nic->uring);
    uint32_t used = nic->operation_count > nic->message_count ? nic->operation_count : nic->message_count;
    uint32_t left = used < NIC_TURN_OPERATIONS ? NIC_TURN_OPERATIONS - used : 0;
    return room < left ? room : left;
}

static struct io_uring_sqe *entry(struct nic *nic, uint32_t opcode, uint32_t connection, uint64_t user_data)
{
    struct io_uring_sqe *sqe = atoll_uring_sqe(&nic->uring);
    assert(sqe != 0); /* the caller has asked for room */
    nic->operation_count++;
    sqe->opcode = (uint8_t)opcode;
    sqe->fd = (int)connection;
    sqe->flags = IOSQE_FIXED_FILE;
    sqe->user_data = user_data;
    return sqe;
}

static void move_bytes(struct nic *nic, uint32_t one, uint32_t many, uint32_t connection, struct iovec *vectors, uint32_t count,
                       uint32_t flags, uint64_t user_data)
{
    struct io_uring_sqe *sqe = entry(nic, count == 1 ? one : many, connection, user_data);
    sqe->msg_flags = flags;
    if (count == 1) {
        sqe->addr = (uint64_t)(uintptr_t)vectors[0].iov_base;
        sqe->len = (uint32_t)vectors[0].iov_len;
        return;
    }
    assert(nic->message_count < NIC_TURN_OPERATIONS);
    struct msghdr *message = &nic->messages[nic->message_count++];
    memset(message, 0, sizeof *message);
    message->msg_iov = vectors;
    message->msg_iovlen = count;
    sqe->addr = (uint64_t)(uintptr_t)message;
    sqe->len = 1;
}

static void uring_receive(struct nic *nic, uint32_t connection, struct iovec *vectors, uint32_t count, uint64_t user_data)
{
    move_bytes(nic, IORING_OP_RECV, IORING_OP_RECVMSG, connection, vectors, count, MSG_DONTWAIT, user_data);
}

static void uring_send(struct nic *nic, uint32_t connection, struct iovec *vectors, uint32_t count, uint64_t user_data)
{
    move_bytes(nic, IORING_OP_SEND, IORING_OP_SENDMSG, connection, vectors, count, MSG_DONTWAIT | MSG_NOSIGNAL, user_data);
}

static void uring_drain(struct nic *nic, uint32_t connection, uint64_t user_data)
{
    struct iovec vector = {.iov_base = nic->scratch, .iov_len = NIC_STREAM_BYTES};
    uring_receive(nic, connection, &vector, 1, user_data);
}

static void uring_accept(struct nic *nic, uint32_t connection, int listener, uint64_t user_data)
{
    struct nic_connection *record = &nic->area->connections[connection];
    struct io_uring_sqe *sqe = entry(nic, IORING_OP_ACCEPT, 0, user_data);
    record->address_length = sizeof record->address;
    sqe->fd = listener;
    sqe->flags = 0;
    sqe->ioprio = nic->accept_flags;
    sqe->addr = (uint64_t)(uintptr_t)record->address;
    sqe->addr2 = (uint64_t)(uintptr_t)&record->address_length;
    sqe->file_index = connection + 1;
}

static void uring_close_socket(struct nic *nic, uint32_t connection, uint64_t user_data)
{
    struct nic_hint *hint = &nic->hints[connection];
    if (nic->poll_in_ring && hint->registered && atoll_uring_room(&nic->uring) > 1) { /* a poll would keep the socket open */
        struct io_uring_sqe *removal = entry(nic, IORING_OP_POLL_REMOVE, 0, nic_user_data(NIC_POLL, connection, UINT32_MAX));
        nic->operation_count--;
        removal->flags = 0;
        removal->fd = -1;
        removal->addr = hint->poll;
        hint->registered = false;
    }
    struct io_uring_sqe *sqe = entry(nic, IORING_OP_CLOSE, 0, user_data);
    sqe->flags = 0;
    sqe->file_index = connection + 1;
}

static void uring_watch(struct nic *nic, uint32_t connection, uint64_t user_data)
{
    struct nic_hint *hint = &nic->hints[connection];
    if (!nic->poll_in_ring) {
        entry(nic, OPCODE_FIXED_FD_INSTALL, connection, user_data);
        return;
    }
    hint->want_shutdown = false; /* no descriptor to shut down: LINGER ends when the peer closes or by its time */
    hint->descriptor_pending = false;
    if (hint->registered)
        return;
    hint->registered = true;
    hint->poll = nic_user_data(NIC_POLL, connection, nic->area->connections[connection].operation[NIC_LIFE] >> 1);
    struct io_uring_sqe *sqe = entry(nic, IORING_OP_POLL_ADD, connection, hint->poll);
    nic->operation_count--; /* its completions come later */
    nic->submission_needed = true;
    sqe->poll32_events = POLLIN | POLLOUT | POLLRDHUP | (uint32_t)EPOLLET;
    sqe->len = IORING_POLL_ADD_MULTI;
}

static uint32_t uring_flush(struct nic *nic)
{
    struct atoll_uring_completion completions[64];
    ATOLL_CRASH_POINT(nic->domain, "nic.submit.before");
    if (io_uring_sq_ready(atoll_uring_inner(&nic->uring)) != 0)
        atoll_uring_submit(&nic->uring); /* what it could not take now (EAGAIN, EBUSY) is submitted with the next turn's */
    if (io_uring_sq_ready(atoll_uring_inner(&nic->uring)) == 0)
        nic->vector_count = nic->message_count = 0; /* no entry refers to them any more */
    ATOLL_CRASH_POINT(nic->domain, "nic.submit.after");
    /* Those seen are taken out of the queue (`retire`) before the next look, which starts at the oldest. */
    uint32_t count = atoll_uring_peek(&nic->uring, completions, 64);
    for (uint32_t index = 0; index < count; index++)
        nic->outcomes[index] = (struct nic_outcome){
            .user_data = completions[index].user_data, .result = completions[index].result, .flags = completions[index].flags};
    nic->completions_seen = count;
    return count;
}

static void uring_retire(struct nic *nic)
{
    if (nic->completions_seen == 0)
        return;
    ATOLL_CRASH_POINT(nic->domain, "nic.retire.before");
    atoll_uring_advance(&nic->uring, nic->completions_seen);
    ATOLL_CRASH_POINT(nic->domain, "nic.retire.after");
    nic->completions_seen = 0;
}

const struct nic_engine nic_engine_uring = {
    .open = uring_open,
    .close = uring_close,
    .room = uring_room,
    .receive = uring_receive,
    .send = uring_send,
    .accept = uring_accept,
    .close_socket = uring_close_socket,
    .drain = uring_drain,
    .watch = uring_watch,
    .flush = uring_flush,
    .retire = uring_retire,
};
