// SPDX-License-Identifier: Apache-2.0
/*
 * What goes from one guest to another, as much of it as goes. Rates are per second of processor time, so that what
 * else runs on the machine counts for nothing.
 *
 *   traffic send ADDRESS PORT SECONDS SIZE   UDP payloads of SIZE bytes; prints the processor time in seconds
 *   traffic count PORT SECONDS               prints how many came, until none comes any more
 *
 * The others are one process each, with nobody to wait for:
 *
 *   traffic ask CLIENT SERVER ADDRESS PORT SECONDS SIZE
 *
 * has a TCP connection between two network namespaces (paths), and prints how often SIZE bytes went there and one byte
 * came back.
 *
 *   traffic taps NAMESPACE ONE NAMESPACE OTHER SECONDS THERE BACK
 *
 * writes the frame THERE (in hexadecimal) to the tap ONE, reads it from the tap OTHER, which answers with the frame
 * BACK; prints how many frames that is. No network stack of guests takes part.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <fcntl.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <netinet/tcp.h>
#include <sched.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define BATCH 64
#define LARGEST 2048
#define ROOM (64 << 20)
#define QUIET 0.1 /* seconds without a datagram after which there are no more */
#define VNET_HEADER 10 /* struct virtio_net_hdr: nothing is left to be done */
#define FRAME 256
#define PATIENCE 500 /* naps */

static const struct timespec nap = { .tv_nsec = 500000 }, long_nap = { .tv_nsec = 10000000 };

static double now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec + time.tv_nsec * 1e-9;
}

static double spent(void)
{
	struct timespec time;

	clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
	return time.tv_sec + time.tv_nsec * 1e-9;
}

static struct sockaddr_in at(const char *address, const char *port)
{
	struct sockaddr_in made = { .sin_family = AF_INET, .sin_port = htons(atoi(port)) };

	made.sin_addr.s_addr = address ? inet_addr(address) : INADDR_ANY;
	return made;
}

/* -- datagrams ------------------------------------------------------------------------------------------------- */

static char payload[BATCH][LARGEST];
static struct iovec parts[BATCH];
static struct mmsghdr messages[BATCH];

static void prepare(size_t size)
{
	for (int i = 0; i < BATCH; i++) {
		parts[i] = (struct iovec){ payload[i], size };
		messages[i].msg_hdr.msg_iov = &parts[i];
		messages[i].msg_hdr.msg_iovlen = 1;
	}
}

static double send_all(const struct sockaddr_in *to, double seconds, int size)
{
	int fd = socket(AF_INET, SOCK_DGRAM, 0);
	double began, end = now() + seconds;

	prepare(size > 0 && size <= LARGEST ? size : 1);
	if (connect(fd, (const struct sockaddr *)to, sizeof(*to)))
		return -1;
	began = spent();
	while (now() < end)
		sendmmsg(fd, messages, BATCH, 0);
	return spent() - began;
}

/* It looks now and then, and waits for nothing: waking the receiver for each datagram would cost the sender most. */
static double count(const struct sockaddr_in *here, double seconds)
{
	int fd = socket(AF_INET, SOCK_DGRAM, 0), room = ROOM;
	double end = now() + seconds, last = 0;
	unsigned long came = 0;

	prepare(LARGEST);
	setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &room, sizeof(room));
	if (bind(fd, (const struct sockaddr *)here, sizeof(*here)))
		return -1;
	puts("ready");
	fflush(stdout);
	while (came ? now() - last < QUIET : now() < end) {
		int done = recvmmsg(fd, messages, BATCH, MSG_DONTWAIT, NULL);

		if (done > 0) {
			came += done;
			last = now();
		} else {
			nanosleep(&nap, NULL);
		}
	}
	return came;
}

/* -- requests and answers -------------------------------------------------------------------------------------- */

static bool enter(const char *namespace)
{
	int fd = open(namespace, O_RDONLY | O_CLOEXEC);
	bool done = fd >= 0 && setns(fd, CLONE_NEWNET) == 0;

	close(fd);
	return done;
}

static bool carry(int from, int to, char *bytes, size_t size)
{
	return send(from, bytes, size, 0) == (ssize_t)size && recv(to, bytes, size, MSG_WAITALL) == (ssize_t)size;
}

/* What is sent has room until it is received, so that one process can do both. */
static int stream_socket(void)
{
	int fd = socket(AF_INET, SOCK_STREAM, 0), yes = 1, room = ROOM;

	setsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, &room, sizeof(room));
	setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &room, sizeof(room));
	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof(yes));
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof(yes));
	return fd;
}

static double ask(char **namespaces, const struct sockaddr_in *server, double seconds, size_t size)
{
	char *bytes = calloc(1, size);
	int client, listener, connection;
	unsigned long asked = 0;
	double began, end;

	if (!bytes || !enter(namespaces[1]))
		return -1;
	listener = stream_socket();
	if (bind(listener, (const struct sockaddr *)server, sizeof(*server)) || listen(listener, 1) ||
	    !enter(namespaces[0]))
		return -1;
	client = stream_socket();
	if (connect(client, (const struct sockaddr *)server, sizeof(*server)))
		return -1;
	connection = accept(listener, NULL, NULL); /* has the listener's settings */
	end = now() + seconds;
	for (began = spent(); now() < end; asked++)
		if (!carry(client, connection, bytes, size) || !carry(connection, client, bytes, 1))
			return -1;
	return asked / (spent() - began);
}

/* -- taps ------------------------------------------------------------------------------------------------------ */

struct port {
	int fd;
	size_t size;
	unsigned char frame[FRAME]; /* what it sends */
};

static bool open_port(struct port *port, const char *namespace, const char *name, const char *frame)
{
	struct ifreq request = { .ifr_flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR };
	unsigned int byte;

	if (!enter(namespace))
		return false;
	strncpy(request.ifr_name, name, IFNAMSIZ - 1);
	port->fd = open("/dev/net/tun", O_RDWR | O_NONBLOCK);
	for (port->size = VNET_HEADER; port->size < FRAME && sscanf(frame, "%2x", &byte) == 1; frame += 2)
		port->frame[port->size++] = byte;
	return port->fd >= 0 && ioctl(port->fd, TUNSETIFF, &request) == 0;
}

/* What is there that was not asked for, of the host itself for example. */
static void drain(const struct port *port)
{
	char any[LARGEST];

	while (read(port->fd, any, sizeof(any)) > 0)
		;
}

static bool pass(const struct port *from, const struct port *to)
{
	char any[LARGEST];

	return write(from->fd, from->frame, from->size) > 0 && read(to->fd, any, sizeof(any)) > 0;
}

static double over_taps(char **places, double seconds, char **frames)
{
	struct port one = { 0 }, other = { 0 };
	unsigned long passed = 0;
	double began, end;

	if (!open_port(&one, places[0], places[1], frames[0]) || !open_port(&other, places[2], places[3], frames[1]))
		return -1;
	/* The ports come up, and a bridge learns who is where. */
	for (int i = 0; i < PATIENCE && !(pass(&one, &other) && pass(&other, &one)); i++)
		nanosleep(&long_nap, NULL);
	drain(&one);
	drain(&other);
	end = now() + seconds;
	began = spent();
	while (now() < end) {
		for (int i = 0; i < BATCH; i++)
			if (!pass(&one, &other) || !pass(&other, &one))
				return -1;
		passed += 2 * BATCH;
	}
	return passed / (spent() - began);
}

int main(int argc, char **argv)
{
	const char *what = argc > 1 ? argv[1] : "";
	struct sockaddr_in there;
	double result = -1;

	if (argc == 6 && !strcmp(what, "send")) {
		there = at(argv[2], argv[3]);
		result = send_all(&there, atof(argv[4]), atoi(argv[5]));
	} else if (argc == 4 && !strcmp(what, "count")) {
		there = at(NULL, argv[2]);
		result = count(&there, atof(argv[3]));
	} else if (argc == 8 && !strcmp(what, "ask")) {
		there = at(argv[4], argv[5]);
		result = ask(argv + 2, &there, atof(argv[6]), atoi(argv[7]));
	} else if (argc == 9 && !strcmp(what, "taps")) {
		result = over_taps(argv + 2, atof(argv[6]), argv + 7);
	} else {
		fputs("usage: see the top of traffic.c\n", stderr);
		return 2;
	}
	if (result < 0) {
		perror(what);
		return 1;
	}
	printf("%f\n", result);
	return 0;
}
