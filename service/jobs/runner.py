"""`python -m service.jobs.runner JOB ATTEMPT ROOT`: the name under which running clusters know a job's driver."""

import sys

from service.jobs.execution.driver import main

if __name__ == "__main__":
    sys.exit(main())
