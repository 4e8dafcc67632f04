"""Parts of networks on a CPU in C++, compiled at first use with the machine's own compiler; see `build`."""
