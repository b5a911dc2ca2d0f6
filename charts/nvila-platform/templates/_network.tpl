{{- /* Whom the pods of the chart call. */ -}}

{{- define "nvila.egressDNS" }}
{{- /* 5353 is the port of OpenShift's DNS pods. */}}
- ports:
    - {protocol: UDP, port: 53}
    - {protocol: TCP, port: 53}
    - {protocol: UDP, port: 5353}
    - {protocol: TCP, port: 5353}
{{- end }}

{{- define "nvila.egressS3" }}
{{- $address := (.Values.s3.endpoint | default "https://s3.amazonaws.com" | urlParse) }}
- ports:
    - {protocol: TCP, port: {{ regexFind "[0-9]+$" (regexFind ":[0-9]+$" $address.host) | default (ternary "80" "443" (eq $address.scheme "http")) }}}
{{- $service := splitList "." (regexReplaceAll ":[0-9]+$" $address.host "") }}
{{- if or (lt (len $service) 3) (eq (index (append $service "svc") 2) "svc") }}
{{- /* A service: policies look at the pod's port, which need not be the service's. */}}
- to:
    - namespaceSelector:
        matchLabels: {kubernetes.io/metadata.name: {{ ternary .Release.Namespace (index (append $service "") 1) (eq (len $service) 1) | quote }}}
{{- end }}
{{- if not .Values.s3.endpoint }}
{{- /* The agent of EKS Pod Identity. */}}
- to:
    - ipBlock: {cidr: 169.254.170.23/32}
  ports:
    - {protocol: TCP, port: 80}
{{- end }}
{{- end }}

{{- define "nvila.egressPostgres" }}
- ports:
    - {protocol: TCP, port: {{ .Values.mlflow.postgres.port }}}
  {{- if eq .Values.mlflow.postgres.mode "own" }}
  to:
    - podSelector:
        matchLabels: {{- include "nvila.selector" (dict "root" . "component" "postgres") | nindent 10 }}
  {{- end }}
{{- end }}
