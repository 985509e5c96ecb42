"""One layer over the GPUs of a host, by both plans of `dsa_ref.parallel`, against one of them: judged, then timed."""
