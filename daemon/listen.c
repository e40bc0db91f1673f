/* SPDX-License-Identifier: Apache-2.0 */
#include "daemon/listen.h"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <pwd.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

/* Given up for a moment when there are no descriptors left, to refuse a caller. */
static int reserve_fd = -1;

static int
make_parents(const char *path, struct err *err)
{
	char *p = strdup(path);

	if (p == NULL)
		return err_set(err, -ENOMEM, "out of memory");
	for (char *s = strchr(p + 1, '/'); s != NULL; s = strchr(s + 1, '/')) {
		*s = '\0';
		if (mkdir(p, 0755) != 0 && errno != EEXIST) {
			int rc = err_set(err, -errno, "%s: %s", p, strerror(errno));

			free(p);
			return rc;
		}
		*s = '/';
	}
	free(p);
	return 0;
}

static int
lock_path(struct listener *l, const char *path, struct err *err)
{
	char *lock;

	if (asprintf(&lock, "%s.lock", path) < 0)
		return err_set(err, -ENOMEM, "out of memory");
	l->lock_fd = open(lock, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
	if (l->lock_fd < 0) {
		int rc = err_set(err, -errno, "%s: %s", lock, strerror(errno));

		free(lock);
		return rc;
	}
	free(lock);
	if (flock(l->lock_fd, LOCK_EX | LOCK_NB) != 0)
		return err_set(err, -EADDRINUSE, "%s: in use by another octetd", path);
	return 0;
}

/* With the lock held, a socket that answers belongs to some other program. */
static int
remove_stale(const struct sockaddr_un *sa, int type, struct err *err)
{
	struct stat st;
	int fd, live;

	if (lstat(sa->sun_path, &st) != 0)
		return 0;
	if (!S_ISSOCK(st.st_mode))
		return err_set(err, -EEXIST, "%s: exists and is no socket", sa->sun_path);
	fd = socket(AF_UNIX, type | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (fd < 0)
		return err_set(err, -errno, "socket: %s", strerror(errno));
	live = connect(fd, (const struct sockaddr *)sa, sizeof(*sa)) == 0 || errno == EAGAIN || errno == EPROTOTYPE;
	close(fd);
	if (live)
		return err_set(err, -EADDRINUSE, "%s: in use by another program", sa->sun_path);
	unlink(sa->sun_path);
	return 0;
}

int
listen_open(struct listener *l, const char *path, int type, unsigned mode, struct err *err)
{
	struct sockaddr_un sa = {.sun_family = AF_UNIX}, tmp = sa;
	int rc;

	*l = (struct listener){-1, -1, NULL};
	/* Room for the ".new" under which it is made. */
	if (strlen(path) + 5 > sizeof(sa.sun_path))
		return err_set(err, -ENAMETOOLONG, "%s: longer than the %zu bytes of a socket path", path,
		    sizeof(sa.sun_path) - 5);
	strcpy(sa.sun_path, path);
	snprintf(tmp.sun_path, sizeof(tmp.sun_path), "%.*s.new", (int)sizeof(tmp.sun_path) - 6, path);
	if ((rc = make_parents(path, err)) != 0 || (rc = lock_path(l, path, err)) != 0 ||
	    (rc = remove_stale(&sa, type, err)) != 0) {
		listen_close(l);
		return rc;
	}
	l->fd = socket(AF_UNIX, type | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	unlink(tmp.sun_path);
	/* It appears under its name only when its mode is right and it listens. */
	if (l->fd < 0 || bind(l->fd, (struct sockaddr *)&tmp, sizeof(tmp)) != 0 || chmod(tmp.sun_path, mode) != 0 ||
	    listen(l->fd, 128) != 0 || rename(tmp.sun_path, path) != 0)
		rc = err_set(err, -errno, "%s: %s", path, strerror(errno));
	else if ((l->path = strdup(path)) == NULL)
		rc = err_set(err, -ENOMEM, "out of memory");
	if (reserve_fd < 0)
		reserve_fd = open("/dev/null", O_RDONLY | O_CLOEXEC);
	if (rc != 0)
		listen_close(l);
	return rc;
}

void
listen_close(struct listener *l)
{
	if (l->fd >= 0)
		close(l->fd);
	if (l->path != NULL) {
		char *lock;

		unlink(l->path);
		if (asprintf(&lock, "%s.lock", l->path) >= 0) {
			unlink(lock);
			free(lock);
		}
	}
	if (l->lock_fd >= 0)
		close(l->lock_fd);
	free(l->path);
	*l = (struct listener){-1, -1, NULL};
}

int
listen_accept(struct listener *l)
{
	int fd = accept4(l->fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);

	if (fd >= 0)
		return fd;
	if ((errno == EMFILE || errno == ENFILE) && reserve_fd >= 0) {
		close(reserve_fd);
		fd = accept4(l->fd, NULL, NULL, SOCK_CLOEXEC);
		if (fd >= 0)
			close(fd);
		reserve_fd = open("/dev/null", O_RDONLY | O_CLOEXEC);
		return -EMFILE;
	}
	return errno == EINTR || errno == ECONNABORTED ? -EAGAIN : -errno;
}

/* ---- who is it ---- */

int
peer_get(struct peer *p, int fd)
{
	struct ucred cred;
	socklen_t len = sizeof(cred);
	char path[64];
	ssize_t n = 0;
	int comm;

	memset(p, 0, sizeof(*p));
	if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &cred, &len) != 0)
		return -errno;
	p->uid = cred.uid, p->gid = cred.gid, p->pid = cred.pid;
	len = 0;
#ifdef SO_PEERGROUPS
	if (getsockopt(fd, SOL_SOCKET, SO_PEERGROUPS, NULL, &len) != 0 && errno == ERANGE && len > 0) {
		p->groups = malloc(len);
		if (p->groups == NULL)
			return -ENOMEM;
		if (getsockopt(fd, SOL_SOCKET, SO_PEERGROUPS, p->groups, &len) == 0)
			p->n_groups = (uint32_t)(len / sizeof(gid_t));
	}
#endif
	snprintf(path, sizeof(path), "/proc/%d/comm", (int)p->pid);
	comm = open(path, O_RDONLY | O_CLOEXEC);
	if (comm >= 0) {
		n = read(comm, p->program, sizeof(p->program) - 1);
		close(comm);
	}
	p->program[n > 0 ? n : 0] = '\0';
	p->program[strcspn(p->program, "\n")] = '\0';
	return 0;
}

void
peer_clear(struct peer *p)
{
	free(p->groups);
	memset(p, 0, sizeof(*p));
}

static int
has_group(const struct peer *p, gid_t gid)
{
	for (uint32_t i = 0; i < p->n_groups; i++)
		if (p->groups[i] == gid)
			return 1;
	return p->gid == gid;
}

static int
parse_id(const char *s, unsigned long *out)
{
	char *end;

	errno = 0;
	*out = strtoul(s, &end, 10);
	return errno == 0 && end != s && *end == '\0' && *s != '-' && *out < 0xffffffffu ? 0 : -EINVAL;
}

/* One entry against one peer (NULL: only whether it is well-formed). */
static int
entry_matches(const struct peer *p, const char *e, struct err *err)
{
	unsigned long id;

	if (strcmp(e, "*") == 0)
		return 1;
	if (strncmp(e, "uid:", 4) == 0 && parse_id(e + 4, &id) == 0)
		return p != NULL && p->uid == id;
	if (strncmp(e, "gid:", 4) == 0 && parse_id(e + 4, &id) == 0)
		return p != NULL && has_group(p, (gid_t)id);
	if (strncmp(e, "user:", 5) == 0) {
		struct passwd *pw = getpwnam(e + 5);

		if (pw == NULL)
			return err_set(err, -EINVAL, "there is no user '%s'", e + 5);
		return p != NULL && p->uid == pw->pw_uid;
	}
	if (strncmp(e, "group:", 6) == 0) {
		struct group *gr = getgrnam(e + 6);

		if (gr == NULL)
			return err_set(err, -EINVAL, "there is no group '%s'", e + 6);
		return p != NULL && has_group(p, gr->gr_gid);
	}
	return err_set(err, -EINVAL, "'%s' is none of user:NAME, group:NAME, uid:N, gid:N, *", e);
}

static int
list_matches(const struct peer *p, const char *list, struct err *err)
{
	char *copy = strdup(list), *save = NULL;
	int hit = 0;

	if (copy == NULL)
		return err_set(err, -ENOMEM, "out of memory");
	for (char *e = strtok_r(copy, ", \t", &save); e != NULL && hit >= 0; e = strtok_r(NULL, ", \t", &save)) {
		int rc = entry_matches(p, e, err);

		if (rc < 0 && p == NULL)
			hit = rc;
		else if (rc > 0)
			hit = 1;
	}
	free(copy);
	return hit;
}

int
peer_allowed(const struct peer *p, const char *list)
{
	if (p->uid == 0 || p->uid == geteuid())
		return 1;
	return list_matches(p, list, NULL) > 0;
}

int
peer_matches(const struct peer *p, const char *list)
{
	return list_matches(p, list, NULL) > 0;
}

int
peer_list_check(const char *list, struct err *err)
{
	int rc = list_matches(NULL, list, err);

	return rc < 0 ? rc : 0;
}
