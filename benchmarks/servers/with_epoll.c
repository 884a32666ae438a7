/*
 * C, with nothing but epoll: what the kernel costs, and so the least that is possible.
 *
 *     with_epoll chunks     send back whatever is there
 *     with_epoll oneshot    send one line back and close
 *
 * It is a floor and no example: it has no buffers, so it relies on the load, which
 * never sends more than it has room to receive, and sends a line in one piece.
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
#include <unistd.h>

#define BACKLOG 1024
#define EVENTS 256

static char buffer[65536];

static void check(int result, const char *what)
{
    if (result < 0) {
        perror(what);
        exit(1);
    }
}

static void watch(int epoll, int fd)
{
    struct epoll_event event = {.events = EPOLLIN, .data.fd = fd};
    check(epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event), "epoll_ctl");
}

static void accept_all(int epoll, int listener)
{
    const int yes = 1;
    int fd;

    while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
        watch(epoll, fd);
    }
}

/* Send all; wait where the socket is full, which this load does not let happen. */
static bool send_all(int fd, const char *data, size_t size)
{
    while (size > 0) {
        ssize_t sent = send(fd, data, size, MSG_NOSIGNAL);
        if (sent < 0 && errno != EAGAIN && errno != EINTR)
            return false;
        if (sent > 0) {
            data += sent;
            size -= (size_t)sent;
        }
    }
    return true;
}

static void serve(int fd, bool oneshot)
{
    ssize_t received = recv(fd, buffer, sizeof buffer, 0);

    if (received < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (received <= 0 || !send_all(fd, buffer, (size_t)received) || oneshot)
        close(fd);
}

int main(int argc, char **argv)
{
    const int yes = 1;
    bool oneshot = argc > 1 && strcmp(argv[1], "oneshot") == 0;
    struct sockaddr_in address = {
        .sin_family = AF_INET,
        .sin_addr.s_addr = htonl(INADDR_LOOPBACK),
    };
    socklen_t size = sizeof address;
    struct epoll_event events[EVENTS];
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    int epoll = epoll_create1(EPOLL_CLOEXEC);

    check(listener, "socket");
    check(epoll, "epoll_create1");
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
    check(bind(listener, (struct sockaddr *)&address, size), "bind");
    check(listen(listener, BACKLOG), "listen");
    check(getsockname(listener, (struct sockaddr *)&address, &size), "getsockname");
    printf("%d\n", ntohs(address.sin_port));
    fflush(stdout);

    watch(epoll, listener);
    for (;;) {
        int ready = epoll_wait(epoll, events, EVENTS, -1);
        for (int i = 0; i < ready; i++) {
            if (events[i].data.fd == listener)
                accept_all(epoll, listener);
            else
                serve(events[i].data.fd, oneshot);
        }
    }
}
