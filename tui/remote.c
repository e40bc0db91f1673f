/* SPDX-License-Identifier: Apache-2.0 */
#include "tui/remote.h"

#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#include "client/ctl.h"
#include "client/ctl-cmd.h"

#define STALE_US 2000000
#define CALL_MS 30000
#define STOP_MS 1000

/* ---- the page ---- */

struct remote {
	const char *socket;
	struct ctl *ctl;
	const struct octet_page *page;
	bool operator;
};

static void
disconnect(struct remote *r)
{
	ctl_page_free(&r->page);
	ctl_close(&r->ctl);
}

static int
connect_daemon(struct remote *r, struct err *err)
{
	int rc = ctl_open(&r->ctl, r->socket, err);

	if (rc == 0)
		rc = ctl_page(r->ctl, &r->page, err);
	if (rc != 0)
		disconnect(r);
	else
		r->operator = ctl_operator(r->ctl);
	return rc;
}

int
remote_new(struct remote **out, const char *socket, struct err *err)
{
	struct remote *r = calloc(1, sizeof(*r));
	int rc;

	*out = NULL;
	if (r == NULL)
		return err_set(err, -ENOMEM, "out of memory");
	r->socket = socket;
	rc = connect_daemon(r, err);
	if (rc != 0)
		remote_free(&r);
	*out = r;
	return rc;
}

void
remote_free(struct remote **r)
{
	if (*r != NULL)
		disconnect(*r);
	free(*r);
	*r = NULL;
}

bool
remote_is_operator(const struct remote *r)
{
	return r->operator;
}

static int64_t
now_us(void)
{
	struct timespec now;

	clock_gettime(CLOCK_REALTIME, &now);
	return (int64_t)now.tv_sec * 1000000 + now.tv_nsec / 1000;
}

enum link
remote_read(struct remote *r, struct octet_page *copy, struct err *why)
{
	int64_t age;

	if (r->page != NULL && !ctl_alive(r->ctl))
		disconnect(r);
	if (r->page == NULL && connect_daemon(r, why) != 0)
		return LINK_DOWN;
	if (page_read(r->page, copy) != 0) {
		err_set(why, -EAGAIN, "octetd stopped while it wrote its status page");
		return LINK_STALE;
	}
	age = now_us() - copy->updated_us;
	if (age < STALE_US)
		return LINK_UP;
	err_set(why, -EAGAIN, "octetd has not refreshed its status page for %d s", (int)(age / 1000000 < 86400 ? age / 1000000 : 86400));
	return LINK_STALE;
}

/* ---- requests ---- */

/* The thread owns all of it from start until it rings; then the main thread does. */
static struct {
	pthread_t thread;
	bool under_way;
	int bell[2];
	char *socket;
	json_t *request, *reply;
	enum then then;
	int rc;
	struct err err;
	int64_t since_us;
} one;

static void *
call_thread(void *arg)
{
	struct ctl *ctl = NULL;
	char ring = 0;

	one.rc = ctl_open(&ctl, one.socket, &one.err);
	if (one.rc == 0)
		one.rc = ctl_call(ctl, one.request, &one.reply, CALL_MS, &one.err);
	ctl_close(&ctl);
	while (write(one.bell[1], &ring, 1) < 0 && errno == EINTR)
		;
	return arg;
}

int
call_start(const char *socket, json_t *request, enum then then, struct err *err)
{
	int rc = 0;

	if (one.under_way)
		rc = err_set(err, -EBUSY, "the last request is not answered yet");
	else if (pipe2(one.bell, O_CLOEXEC) != 0)
		rc = err_set(err, -errno, "pipe: %s", strerror(errno));
	if (rc != 0) {
		json_decref(request);
		return rc;
	}
	one.socket = socket != NULL ? strdup(socket) : NULL;
	one.request = request, one.reply = NULL, one.then = then, one.since_us = now_us();
	one.err.text[0] = '\0';
	rc = pthread_create(&one.thread, NULL, call_thread, NULL);
	if (rc != 0) {
		close(one.bell[0]), close(one.bell[1]);
		free(one.socket);
		json_decref(request);
		return err_set(err, -rc, "thread: %s", strerror(rc));
	}
	one.under_way = true;
	return 0;
}

int
call_fd(void)
{
	return one.under_way ? one.bell[0] : -1;
}

int64_t
call_age_ms(void)
{
	return one.under_way ? (now_us() - one.since_us) / 1000 : -1;
}

enum then
call_take(int *rc, struct err *err, json_t **reply)
{
	pthread_join(one.thread, NULL);
	one.under_way = false;
	close(one.bell[0]), close(one.bell[1]);
	free(one.socket);
	json_decref(one.request);
	*rc = one.rc, *err = one.err, *reply = one.reply;
	return one.then;
}

/* ---- commands ---- */

static struct {
	pid_t pid;
	int fd;
} job = {0, -1};

static void
run_child(const char *socket, const char *command, int out)
{
	static char name[] = "octetctl", option[] = "--socket";
	char text[PROMPT_TEXT], *word[MAX_WORDS], *argv[MAX_WORDS + 4];
	int null = open("/dev/null", O_RDONLY), n, argc = 0, status;
	sigset_t none;

	sigemptyset(&none);
	for (int s = 1; s < 32; s++)
		signal(s, SIG_DFL);
	sigprocmask(SIG_SETMASK, &none, NULL);
	prctl(PR_SET_PDEATHSIG, SIGTERM);
	/* ^C and ^Z at the terminal are the console's. */
	setpgid(0, 0);
	dup2(null, STDIN_FILENO), dup2(out, STDOUT_FILENO), dup2(out, STDERR_FILENO);
	/* Else the daemon would see the console's connection open as long as the command runs. */
	close_range(3, ~0u, 0);
	snprintf(text, sizeof(text), "%s", command);
	n = command_words(text, word);
	argv[argc++] = name;
	if (socket != NULL) {
		argv[argc++] = option;
		argv[argc++] = (char *)(uintptr_t)socket;
	}
	for (int i = 0; i < n; i++)
		argv[argc++] = word[i];
	argv[argc] = NULL;
	optind = 0; /* the console's options were parsed with it */
	status = octetctl_main(argc, argv);
	fflush(stdout);
	_exit(status);
}

/* A terminal, so that lines come as they are written, and progress at all. */
static int
open_pty(int fd[2])
{
	struct termios t;
	const char *name;

	fd[0] = posix_openpt(O_RDWR | O_NOCTTY | O_CLOEXEC);
	if (fd[0] < 0)
		return -1;
	name = grantpt(fd[0]) == 0 && unlockpt(fd[0]) == 0 ? ptsname(fd[0]) : NULL;
	fd[1] = name != NULL ? open(name, O_RDWR | O_NOCTTY | O_CLOEXEC) : -1;
	if (fd[1] < 0) {
		close(fd[0]);
		return -1;
	}
	if (tcgetattr(fd[1], &t) == 0) {
		cfmakeraw(&t);
		tcsetattr(fd[1], TCSANOW, &t);
	}
	return 0;
}

int
job_start(const char *socket, const char *command, uint32_t *pid, struct err *err)
{
	int fd[2];

	if (job.fd >= 0)
		return err_set(err, -EBUSY, "another command runs");
	if (open_pty(fd) != 0 && pipe2(fd, O_CLOEXEC) != 0)
		return err_set(err, -errno, "pipe: %s", strerror(errno));
	job.pid = fork();
	if (job.pid == 0)
		run_child(socket, command, fd[1]);
	close(fd[1]);
	if (job.pid < 0) {
		close(fd[0]);
		return err_set(err, -errno, "fork: %s", strerror(errno));
	}
	job.fd = fd[0];
	*pid = (uint32_t)job.pid;
	return 0;
}

int
job_fd(void)
{
	return job.fd;
}

static int
end_of_job(void)
{
	int status = 0;

	close(job.fd);
	job.fd = -1;
	while (waitpid(job.pid, &status, 0) < 0 && errno == EINTR)
		;
	return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

size_t
job_read(char *buf, size_t len, int *status)
{
	ssize_t n = read(job.fd, buf, len);

	*status = -1;
	if (n < 0 && errno == EINTR)
		return 0;
	if (n <= 0)
		*status = end_of_job();
	return n > 0 ? (size_t)n : 0;
}

/* An eval first takes back what it began. */
void
job_stop(void)
{
	struct pollfd p = {.fd = job.fd, .events = 0};

	if (job.fd < 0)
		return;
	kill(job.pid, SIGTERM);
	if (poll(&p, 1, STOP_MS) == 0)
		kill(job.pid, SIGKILL);
	end_of_job();
}
