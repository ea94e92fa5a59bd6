"""The bodies of requests and responses.

Requests forbid unknown keys, so that a misspelt setting is an error and not a default. Rows become responses in
`describe.py`.
"""

from server.schemas.chat import CreateChat as CreateChat
from server.schemas.chat import Usage as Usage
from server.schemas.files import CompleteUpload as CompleteUpload
from server.schemas.files import CreateUpload as CreateUpload
from server.schemas.files import DeletedFile as DeletedFile
from server.schemas.files import ExpiresAfter as ExpiresAfter
from server.schemas.files import FileList as FileList
from server.schemas.files import FileObject as FileObject
from server.schemas.files import Purpose as Purpose
from server.schemas.files import Upload as Upload
from server.schemas.files import UploadPart as UploadPart
from server.schemas.hosts import Host as Host
from server.schemas.hosts import HostList as HostList
from server.schemas.hosts import Readiness as Readiness
from server.schemas.job_creation import CreateJob as CreateJob
from server.schemas.job_creation import Hyperparameters as Hyperparameters
from server.schemas.job_creation import Metadata as Metadata
from server.schemas.job_creation import Method as Method
from server.schemas.job_creation import Supervised as Supervised
from server.schemas.jobs import Attempt as Attempt
from server.schemas.jobs import CheckpointList as CheckpointList
from server.schemas.jobs import CheckpointMetrics as CheckpointMetrics
from server.schemas.jobs import Evaluation as Evaluation
from server.schemas.jobs import EventList as EventList
from server.schemas.jobs import FineTuningJob as FineTuningJob
from server.schemas.jobs import ForeignLomo as ForeignLomo
from server.schemas.jobs import JobCheckpoint as JobCheckpoint
from server.schemas.jobs import JobError as JobError
from server.schemas.jobs import JobEvent as JobEvent
from server.schemas.jobs import JobList as JobList
from server.schemas.jobs import JobLomo as JobLomo
from server.schemas.jobs import JobMetrics as JobMetrics
from server.schemas.jobs import JobPage as JobPage
from server.schemas.jobs import Memory as Memory
from server.schemas.jobs import RunState as RunState
from server.schemas.jobs import UsedHyperparameters as UsedHyperparameters
from server.schemas.jobs import UsedMethod as UsedMethod
from server.schemas.jobs import UsedSupervised as UsedSupervised
from server.schemas.models import DeletedModel as DeletedModel
from server.schemas.models import Model as Model
from server.schemas.models import ModelList as ModelList
from server.schemas.plan import Fit as Fit
from server.schemas.plan import Plan as Plan
from server.schemas.plan import PlanPhase as PlanPhase
from server.schemas.plan import PlanRequest as PlanRequest
from server.schemas.queries import CheckpointsQuery as CheckpointsQuery
from server.schemas.queries import EventsQuery as EventsQuery
from server.schemas.queries import ExportQuery as ExportQuery
from server.schemas.queries import FilesQuery as FilesQuery
from server.schemas.queries import JobsQuery as JobsQuery
from server.schemas.queries import MetricsQuery as MetricsQuery
