{{- /* Gives service accounts a Role. Their names are a JSON list: include passes text only. */ -}}

{{- define "nvila.binding" -}}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata:
  name: {{ .role }}
  namespace: {{ .namespace | quote }}
  labels: {{- include "nvila.labels" .root | nindent 4 }}
roleRef:
  apiGroup: rbac.authorization.k8s.io
  kind: Role
  name: {{ .role }}
subjects:
  {{- $from := .from }}
  {{- range .accounts }}
  - kind: ServiceAccount
    name: {{ . | quote }}
    namespace: {{ $from | quote }}
  {{- end }}
{{- end }}
