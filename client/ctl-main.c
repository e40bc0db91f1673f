/* SPDX-License-Identifier: Apache-2.0 */
#include "client/ctl-cmd.h"

int
main(int argc, char **argv)
{
	return octetctl_main(argc, argv);
}
