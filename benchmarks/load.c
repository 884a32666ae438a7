/*
 * The clients: one thread that keeps a server busy, and what the server spent on it.
 *
 *     load WORK PORT CONNECTIONS SIZE SECONDS PID
 *
 * WORK is one of
 *     exchange   send SIZE bytes, receive as many, and again
 *     churn      connect, send SIZE bytes, receive as many, reset; and again
 *     oneshot    connect, send SIZE bytes, receive as many and then the server's end
 *     bulk       keep up to WINDOW times SIZE bytes under way, receive what comes back
 *     idle       connect, exchange SIZE bytes once, then do nothing
 *
 * PORT is one of 127.0.0.1; PID is the server's process. A fifth of SECONDS goes by
 * first, for the server to warm up; what happens in the SECONDS after it counts. (For
 * idle, all connections are made, and SECONDS are not used.)
 *
 * The CPU time of the server, user and system, is read here and not by who runs this,
 * so that it is that of the same span as the operations. It is what /proc/PID/stat has
 * as utime + stime, but in nanoseconds and not in ticks of 10 ms.
 *
 * One line of JSON tells what was seen.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define EVENTS 512
#define ROOM (1 << 20)      /* Bytes received at a time, at most. */
#define WINDOW 4            /* Pieces that bulk has under way on a connection. */
#define CONNECTING 128      /* Connections that idle makes at a time. */
#define PATIENCE 30.0       /* Seconds that idle's connections may take. */
#define SETTLE_MS 500       /* What idle gives the server before it weighs it. */

enum work { EXCHANGE, CHURN, ONESHOT, BULK, IDLE };

static const char *const WORKS[] = {"exchange", "churn", "oneshot", "bulk", "idle"};

struct client {
    int fd;
    bool is_connected;
    size_t sent;     /* Of this operation; with bulk, in all. */
    size_t received; /* The same. */
};

static enum work work;
static struct sockaddr_in server = {.sin_family = AF_INET};
static int epoll;
static size_t size;
static char *piece;      /* What is sent, SIZE bytes that end in a newline. */
static char room[ROOM];  /* What is received. */

static unsigned long done, failed;
static unsigned long long bytes;

static void die(const char *what)
{
    perror(what);
    exit(1);
}

static double seconds_of(clockid_t clock)
{
    struct timespec time;

    if (clock_gettime(clock, &time) < 0)
        die("clock_gettime");
    return (double)time.tv_sec + (double)time.tv_nsec * 1e-9;
}

static double now(void)
{
    return seconds_of(CLOCK_MONOTONIC);
}

/* The memory of a process, in bytes. */
static long resident(int pid)
{
    char path[64], line[256];
    long kilobytes = -1;
    FILE *status;

    snprintf(path, sizeof path, "/proc/%d/status", pid);
    status = fopen(path, "r");
    if (status == NULL)
        die(path);
    while (fgets(line, sizeof line, status) != NULL)
        if (sscanf(line, "VmRSS: %ld kB", &kilobytes) == 1)
            break;
    fclose(status);
    return kilobytes * 1024;
}

static void watch(struct client *client, int operation, unsigned events)
{
    struct epoll_event event = {.events = events, .data.ptr = client};

    if (epoll_ctl(epoll, operation, client->fd, &event) < 0)
        die("epoll_ctl");
}

static void start(struct client *client)
{
    const int yes = 1;

    client->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (client->fd < 0)
        die("socket");
    client->is_connected = false;
    client->sent = client->received = 0;
    setsockopt(client->fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
    if (connect(client->fd, (struct sockaddr *)&server, sizeof server) < 0 &&
        errno != EINPROGRESS)
        die("connect"); /* No local port is left, for one: no error of the server. */
    watch(client, EPOLL_CTL_ADD, EPOLLOUT);
}

/* Close with a reset, which leaves nothing in TIME_WAIT. */
static void reset(struct client *client)
{
    const struct linger at_once = {.l_onoff = 1, .l_linger = 0};

    setsockopt(client->fd, SOL_SOCKET, SO_LINGER, &at_once, sizeof at_once);
    close(client->fd);
}

/* How much this client may send now. Bulk sends whole pieces, however it receives. */
static size_t to_send(const struct client *client)
{
    if (work == BULK)
        return (client->received / size + WINDOW) * size - client->sent;
    return size - client->sent;
}

/* Send what may be sent. False if the connection is lost. */
static bool send_some(struct client *client, bool was_waiting)
{
    size_t left;

    while ((left = to_send(client)) > 0) {
        size_t at = client->sent % size;
        size_t length = left < size - at ? left : size - at;
        ssize_t sent = send(client->fd, piece + at, length, MSG_NOSIGNAL);

        if (sent < 0) {
            if (errno != EAGAIN)
                return false;
            break;
        }
        client->sent += (size_t)sent;
    }
    if (left > 0)
        watch(client, EPOLL_CTL_MOD, EPOLLIN | EPOLLOUT);
    else if (was_waiting)
        watch(client, EPOLL_CTL_MOD, EPOLLIN);
    return true;
}

/* The socket is connected, or has room again. False if the connection is lost. */
static bool writable(struct client *client)
{
    int error = 0;
    socklen_t length = sizeof error;

    if (!client->is_connected) {
        getsockopt(client->fd, SOL_SOCKET, SO_ERROR, &error, &length);
        if (error != 0)
            return false;
        client->is_connected = true;
    }
    return send_some(client, true);
}

/* Something has come, or the end. False if the connection is lost. */
static bool readable(struct client *client)
{
    ssize_t received = recv(client->fd, room, sizeof room, 0);

    if (received < 0)
        return errno == EAGAIN;
    if (received == 0) {
        if (work != ONESHOT || client->received != size)
            return false;
        done++;
        close(client->fd);
        start(client);
        return true;
    }
    bytes += (unsigned long long)received;
    if (work == BULK) {
        done += (client->received % size + (size_t)received) / size;
        client->received += (size_t)received;
        return send_some(client, false);
    }
    if (client->received + (size_t)received > size ||
        memcmp(room, piece + client->received, (size_t)received) != 0) {
        fprintf(stderr, "the server sent back what was not sent\n");
        exit(1);
    }
    client->received += (size_t)received;
    if (client->received < size || work == ONESHOT)
        return true;
    done++;
    if (work == EXCHANGE) {
        client->sent = client->received = 0;
        return send_some(client, false);
    }
    if (work == CHURN) {
        reset(client);
        start(client);
    }
    return true;
}

/* Serve whoever is ready, or wait a little. */
static void turn(void)
{
    static struct epoll_event events[EVENTS];
    int ready = epoll_wait(epoll, events, EVENTS, 10);

    for (int i = 0; i < ready; i++) {
        struct client *client = events[i].data.ptr;
        bool is_well = !(events[i].events & EPOLLERR);

        if (is_well && events[i].events & EPOLLOUT)
            is_well = writable(client);
        if (is_well && events[i].events & (EPOLLIN | EPOLLHUP))
            is_well = readable(client);
        if (!is_well) {
            failed++;
            close(client->fd);
            start(client);
        }
    }
}

static void run_until(double end)
{
    while (now() < end)
        turn();
}

static void keep_busy(struct client *clients, int count, double seconds, int pid)
{
    clockid_t server_clock;
    unsigned long done_before;
    unsigned long long bytes_before;
    double began, cpu, own_cpu, span;

    if ((errno = clock_getcpuclockid(pid, &server_clock)) != 0)
        die("clock_getcpuclockid");
    for (int i = 0; i < count; i++)
        start(&clients[i]);
    run_until(now() + seconds / 5);

    done_before = done;
    bytes_before = bytes;
    failed = 0;
    own_cpu = seconds_of(CLOCK_PROCESS_CPUTIME_ID);
    cpu = seconds_of(server_clock);
    began = now();
    run_until(began + seconds);
    cpu = seconds_of(server_clock) - cpu;
    span = now() - began;
    own_cpu = seconds_of(CLOCK_PROCESS_CPUTIME_ID) - own_cpu;

    printf("{\"operations\": %lu, \"bytes\": %llu, \"failed\": %lu, \"seconds\": %.6f, "
           "\"server_cpu_seconds\": %.6f, \"load_cpu_seconds\": %.6f}\n",
           done - done_before, bytes - bytes_before, failed, span, cpu, own_cpu);
}

static void hold(struct client *clients, int count, int pid)
{
    double deadline = now() + PATIENCE;
    long before = resident(pid);
    int started = 0;

    while (done < (unsigned long)count && now() < deadline) {
        while (started < count && (unsigned long)started < done + CONNECTING)
            start(&clients[started++]);
        turn();
    }
    if (done < (unsigned long)count) {
        fprintf(stderr, "only %lu of %d connections were served\n", done, count);
        exit(1);
    }
    usleep(SETTLE_MS * 1000);
    printf("{\"connections\": %d, \"failed\": %lu, \"memory_bytes\": %ld}\n", count,
           failed, resident(pid) - before);
}

int main(int argc, char **argv)
{
    struct client *clients;
    int count, pid;
    double seconds;

    if (argc != 7) {
        fprintf(stderr, "usage: load WORK PORT CONNECTIONS SIZE SECONDS PID\n");
        return 2;
    }
    while (strcmp(argv[1], WORKS[work]) != 0)
        if (++work > IDLE) {
            fprintf(stderr, "unknown work: %s\n", argv[1]);
            return 2;
        }
    server.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    server.sin_port = htons((unsigned short)atoi(argv[2]));
    count = atoi(argv[3]);
    size = (size_t)atol(argv[4]);
    seconds = atof(argv[5]);
    pid = atoi(argv[6]);

    piece = malloc(size);
    clients = calloc((size_t)count, sizeof *clients);
    epoll = epoll_create1(EPOLL_CLOEXEC);
    if (size < 1 || piece == NULL || clients == NULL || epoll < 0)
        die("load");
    memset(piece, 'x', size);
    piece[size - 1] = '\n';

    if (work == IDLE)
        hold(clients, count, pid);
    else
        keep_busy(clients, count, seconds, pid);
    return 0;
}
