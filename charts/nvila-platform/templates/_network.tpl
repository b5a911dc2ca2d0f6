{{- /* Whom the pods of the chart call. */ -}}

{{- define "nvila.egressDNS" }}
{{- /* 5353 is the port of OpenShift's DNS pods. */}}
- ports:
    - {protocol: UDP, port: 53}
    - {protocol: TCP, port: 53}
    - {protocol: UDP, port: 5353}
    - {protocol: TCP, port: 5353}
{{- end }}

{{- /* A server by its URL. */ -}}
{{- define "nvila.egressAddress" }}
{{- $address := urlParse .address }}
- ports:
    - {protocol: TCP, port: {{ regexFind "[0-9]+$" (regexFind ":[0-9]+$" $address.host) | default (ternary "80" "443" (eq $address.scheme "http")) }}}
{{- $service := splitList "." (regexReplaceAll ":[0-9]+$" $address.host "") }}
{{- if and (not (hasPrefix "[" $address.host)) (or (lt (len $service) 3) (eq (index (append $service "svc") 2) "svc")) }}
{{- /* A service: policies look at the pod's port, which need not be the service's. */}}
- to:
    - namespaceSelector:
        matchLabels: {kubernetes.io/metadata.name: {{ ternary .root.Release.Namespace (index (append $service "") 1) (eq (len $service) 1) | quote }}}
{{- end }}
{{- end }}

{{- define "nvila.egressS3" }}
{{- include "nvila.egressAddress" (dict "root" . "address" (.Values.s3.endpoint | default "https://s3.amazonaws.com")) }}
{{- with .Values.proxy.url }}
{{- include "nvila.egressAddress" (dict "root" $ "address" .) }}
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

{{- define "nvila.egressTracking" }}
{{- if eq .Values.mlflow.mode "own" }}
- ports:
    - {protocol: TCP, port: 5000}
  to:
    - namespaceSelector:
        matchLabels: {kubernetes.io/metadata.name: {{ .Release.Namespace | quote }}}
      podSelector:
        matchLabels: {{- include "nvila.selector" (dict "root" . "component" "mlflow") | nindent 10 }}
{{- else }}
{{- include "nvila.egressAddress" (dict "root" . "address" .Values.mlflow.uri) }}
{{- end }}
{{- end }}

{{- define "nvila.fromController" -}}
- namespaceSelector:
    matchLabels: {kubernetes.io/metadata.name: {{ .Release.Namespace | quote }}}
  podSelector:
    matchLabels: {{- include "nvila.selector" (dict "root" . "component" "controller") | nindent 6 }}
{{- end }}

{{- /* Prometheus reads metrics from the namespaces that the site names. */ -}}
{{- define "nvila.ingressMetrics" }}
{{- with .root.Values.networkPolicies.clients }}
- ports:
    - {protocol: TCP, port: {{ $.port }}}
  from:
    - namespaceSelector:
        matchExpressions:
          - {key: kubernetes.io/metadata.name, operator: In, values: {{ . | toJson }}}
{{- end }}
{{- end }}
