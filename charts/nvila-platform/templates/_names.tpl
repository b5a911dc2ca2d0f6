{{- /* Labels, namespaces, and what every pod of the chart has in common. */ -}}

{{- define "nvila.labels" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- define "nvila.selector" -}}
app.kubernetes.io/instance: {{ .root.Release.Name | quote }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- /* The pods of training jobs, in whatever namespace: other software has a component of that name, too. */ -}}
{{- define "nvila.training" -}}
app.kubernetes.io/part-of: nvila
app.kubernetes.io/component: training
{{- end }}

{{- /* The pods that the controller makes. */ -}}
{{- define "nvila.serving" -}}
app.kubernetes.io/part-of: nvila
app.kubernetes.io/component: serving
{{- end }}

{{- /* A JSON list: include passes text only. */ -}}
{{- define "nvila.namespaces" -}}
{{- .Values.namespaces | default (list .Release.Namespace) | toJson }}
{{- end }}

{{- define "nvila.pipelineNamespace" -}}
{{- .Values.pipelines.namespace | default .Release.Namespace }}
{{- end }}

{{- define "nvila.trackingURI" -}}
{{- if eq .Values.mlflow.mode "own" }}http://nvila-mlflow.{{ .Release.Namespace }}.svc.cluster.local:5000
{{- else if eq .Values.mlflow.mode "external" }}{{ .Values.mlflow.uri }}
{{- end }}
{{- end }}

{{- define "nvila.mlflowStore" -}}
postgresql+psycopg2:///{{ .Values.mlflow.postgres.database }}
{{- end }}

{{- /* Users and what they may stand in the same database, and so in its backups. */ -}}
{{- define "nvila.mlflowAuth" -}}
[mlflow]
default_permission = {{ .Values.mlflow.auth.defaultPermission }}
database_uri = {{ include "nvila.mlflowStore" . }}
# Checking a password takes a third of a second: what was right stays right for a minute in each of the server's processes.
auth_cache_ttl_seconds = 60
{{- end }}

{{- define "nvila.postgresHost" -}}
{{- if eq .Values.mlflow.postgres.mode "own" }}nvila-postgres{{ else }}{{ .Values.mlflow.postgres.host }}{{ end }}
{{- end }}

{{- /* The restricted Pod Security profile. 65532 is the user of our images. */ -}}
{{- define "nvila.podSecurity" -}}
runAsNonRoot: true
runAsUser: {{ . }}
runAsGroup: {{ . }}
fsGroup: {{ . }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "nvila.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities: {drop: [ALL]}
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- /* Without the last slash: some clients put theirs behind it, and a key that begins with one is another. */ -}}
{{- define "nvila.s3Endpoint" -}}
{{- trimSuffix "/" .Values.s3.endpoint }}
{{- end }}

{{- /* The credentials of the S3 store; a missing Secret leaves the pod to its service account's identity. */ -}}
{{- define "nvila.s3Environment" -}}
- {name: AWS_REGION, value: {{ .Values.s3.region | quote }}}
{{- with include "nvila.s3Endpoint" . }}
- {name: AWS_ENDPOINT_URL, value: {{ . | quote }}}
- {name: MLFLOW_S3_ENDPOINT_URL, value: {{ . | quote }}}
{{- end }}
{{- range list "AWS_ACCESS_KEY_ID" "AWS_SECRET_ACCESS_KEY" }}
- name: {{ . | quote }}
  valueFrom: {secretKeyRef: {name: nvila-credentials, key: {{ . }}, optional: true}}
{{- end }}
{{- end }}

{{- define "nvila.postgresEnvironment" -}}
- {name: PGHOST, value: {{ include "nvila.postgresHost" . | quote }}}
- {name: PGPORT, value: {{ .Values.mlflow.postgres.port | quote }}}
- {name: PGDATABASE, value: {{ .Values.mlflow.postgres.database | quote }}}
- {name: PGUSER, value: {{ .Values.mlflow.postgres.user | quote }}}
- name: PGPASSWORD
  valueFrom: {secretKeyRef: {name: {{ .Values.mlflow.postgres.secret | quote }}, key: password}}
{{- if include "nvila.postgresVerified" . }}
- {name: PGSSLMODE, value: verify-full}
- {name: PGSSLROOTCERT, value: /etc/nvila-postgres/ca.crt}
{{- end }}
{{- end }}

{{- /* An external database must show a certificate of the Secret's authority; the own one is fenced by its policy. */ -}}
{{- define "nvila.postgresVerified" -}}
{{- if and (eq .Values.mlflow.postgres.mode "external") .Values.mlflow.postgres.tls }}true{{ end }}
{{- end }}

{{- define "nvila.postgresAuthorityMount" -}}
{{- if include "nvila.postgresVerified" . -}}
- {name: postgres-authority, mountPath: /etc/nvila-postgres, readOnly: true}
{{- end }}
{{- end }}

{{- define "nvila.postgresAuthorityVolume" -}}
{{- if include "nvila.postgresVerified" . -}}
- name: postgres-authority
  secret:
    secretName: {{ .Values.mlflow.postgres.secret | quote }}
    items: [{key: ca.crt, path: ca.crt}]
{{- end }}
{{- end }}
