"""What a server counts and measures, in the text format of Prometheus."""

from __future__ import annotations

import prometheus_client as prometheus

BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)


class Metrics:
    """Metrics of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = prometheus.CollectorRegistry()
        prometheus.ProcessCollector(registry=self.registry)

        def histogram(name: str, about: str, *labels: str) -> prometheus.Histogram:
            return prometheus.Histogram(name, about, labels, registry=self.registry, buckets=BUCKETS)

        def counter(name: str, about: str, *labels: str) -> prometheus.Counter:
            return prometheus.Counter(name, about, labels, registry=self.registry)

        self._requests = counter("ldm2_requests", "Answers to requests", "method", "path", "status")
        self._answer = histogram("ldm2_request_seconds", "Until an answer is complete", "method", "path")
        self._jobs = counter("ldm2_jobs", "Jobs that have ended", "kind", "status")
        self._waited = histogram("ldm2_job_wait_seconds", "From a job's arrival to its run", "kind")
        self._ran = histogram("ldm2_job_run_seconds", "The run of a job", "kind")
        self._step = histogram("ldm2_step_seconds", "A step of the sampler, of a whole batch")
        self._stage = histogram("ldm2_stage_seconds", "A stage of a run", "stage")
        self._batch = prometheus.Histogram("ldm2_batch_jobs", "Jobs of a run", registry=self.registry,
                                           buckets=(1, 2, 4, 8, 16, 32, 64))
        self.queue = prometheus.Gauge("ldm2_queue_jobs", "Jobs that wait", registry=self.registry)
        self.running = prometheus.Gauge("ldm2_running_jobs", "Jobs that run", registry=self.registry)
        self.kept = prometheus.Gauge("ldm2_kept_bytes", "Results and uploads that are kept", registry=self.registry)
        self.device = prometheus.Gauge("ldm2_device_memory_bytes", "Memory of the GPU in use", registry=self.registry)

    def answered(self, method: str, path: str, status: int, seconds: float) -> None:
        """A request has its answer. path: of the route, without ids."""
        self._requests.labels(method, path, str(status)).inc()
        self._answer.labels(method, path).observe(seconds)

    def ended(self, kind: str, status: str, created: float, started: float | None, finished: float) -> None:
        """A job has ended, at these times in seconds since 1970; `started` is None for one that never ran."""
        self._jobs.labels(kind, status).inc()
        if started is not None:
            self._waited.labels(kind).observe(started - created)
            self._ran.labels(kind).observe(finished - started)

    def run(self, jobs: int) -> None:
        """A run of so many jobs begins."""
        self._batch.observe(jobs)

    def step(self, seconds: float) -> None:
        """A step has been taken."""
        self._step.observe(seconds)

    def stage(self, name: str, seconds: float) -> None:
        """A stage is through."""
        self._stage.labels(name).observe(seconds)

    def text(self) -> bytes:
        """All of it, as a scraper reads it."""
        return prometheus.generate_latest(self.registry)
