"""Celery, tamed: wake-ups travel through it, work does not.

The job queue is the database. A worker claims a job there, holds a lease on it, and writes under a fence. Celery gives
the worker its threads and the connection to the broker. Its own queue semantics are switched off, and this package
says where and why:

- **Wake-ups, not work.** A message carries the id of a job or a batch and nothing else. It may be lost or arrive twice:
  a worker asks the database which job is next, and the rescuer repeats lost wake-ups. (`tpo.broker`)
- **No beat.** Celery's scheduler compares wall-clock times, and stands still for as long as a clock was set back. No
  message has an expiry or a start time, which would compare the clocks of two machines. (`worker.loops`)
- **Early acknowledgement.** `task_acks_late` is off. The lease in the database already brings a lost job back, and with
  late acknowledgement Celery 5.7.0 stops consuming when the broker goes away under a busy worker. (`app`)
- **No prefetch.** A wake-up reserved by a busy worker would be lost on an idle one, so `worker_disable_prefetch` is on
  and the prefetch multiplier is 1. (`app`)
- **No result backend.** Outcomes are rows that the lease holder writes; `task_ignore_result` is on. (`app`)
- **Threads.** One process holds the models, and its threads share them: `worker_pool` is `threads`. (`app`)
- **Reconnection without end.** Celery's pause between two attempts grows to 30 s; `reconnect` caps it at 2 s and logs
  one line for each attempt. A broker that answers but refuses, for example because its memory is full, accepts the
  next connection at once and refuses again, so the consumer sleeps between attempts. (`app`)
- **Watched consumer.** Celery's consumer can stop consuming for good after broker trouble (celery#10205) while its
  process lives and renews leases. `consumer_watch` notices that messages are queued, a thread is idle and nothing
  arrives, and ends the process with exit code 1 so that its supervisor restarts it.
- **One log format.** Celery neither configures logging nor redirects stdout, and its lines for each task are silenced:
  the worker logs each job itself, and never a user's text. (`app`, `worker.logs`)
- **Bounded shutdown.** Signals begin a drain (`worker.drain`); `stop_consuming` ends Celery's loop, and the process
  exits in bounded time even if the broker or the database hangs.
- **Reduced remote control.** A process answers only the commands that Flower and the health check read. It ignores
  `shutdown`, `rate_limit`, `cancel_consumer`, `pool_shrink`, `revoke` and all others. (`app`)
- **Silent broker.** While no message arrives, a worker takes waiting jobs from the database. (`worker.queue_poller`)
- **Read-only Flower.** Flower shows Celery's messages and can change nothing. With a password set, its metrics need
  the password too. (`flower`)
"""
